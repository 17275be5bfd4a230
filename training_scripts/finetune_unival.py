"""Fine-tune a UnIVAL checkpoint on any data set of `datasets`, with the Trainer.

Gives   a folder with model, processor, model card, losses and scores; with --push_to_hub the same on the Hub.
Costs   what the checkpoint costs; README.md here has measured runs.
Run     python training_scripts/finetune_unival.py training_scripts/settings/finetune_unival.yaml
        or with flags in place of the file: --model_name_or_path runs/unival --dataset_name DATA/nlvr ...

`--help` lists the arguments: those of model and data, and all of `transformers.TrainingArguments`.
"""

from unival_finetuning import FineTuning, last_checkpoint

from hf_vlmerge.training.arguments import VlmergeTrainingArguments
from hf_vlmerge.training.script_arguments import DataTrainingArguments, ModelArguments, parse_arguments
from hf_vlmerge.training.trainer import VlmergeTrainer


def main() -> None:
    model_arguments, data, training = parse_arguments(ModelArguments, DataTrainingArguments, VlmergeTrainingArguments)
    checkpoint = last_checkpoint(training.resume_from_checkpoint, training.output_dir)
    tuning = FineTuning.load(model_arguments, data, training.seed)
    if data.streaming:  # else the first process decodes the media of all
        training.accelerator_config.dispatch_batches = False
    training.dataloader_pin_memory &= training.device.type != "cpu"

    trainer = VlmergeTrainer(
        model=tuning.model,
        args=training,
        train_dataset=tuning.train,
        eval_dataset=tuning.validation,
        data_collator=tuning.collator,
        eval_collator=tuning.eval_collator,
        processing_class=tuning.processor,
    )
    if data.predict_with_generate:
        trainer.score = lambda model: tuning.scores(model, trainer.accelerator, training.per_device_eval_batch_size)

    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if tuning.validation is not None:
        scores = trainer.evaluate()
        trainer.log_metrics("eval", scores)
        trainer.save_metrics("eval", scores)

    facts = tuning.card_facts()
    if training.push_to_hub:
        trainer.push_to_hub(**facts)
    else:
        trainer.create_model_card(**facts)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
