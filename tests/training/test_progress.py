"""The bar counts steps and shows the losses."""

from types import SimpleNamespace

from hf_vlmerge.training.progress import ProgressBar


def test_a_run(capsys):
    bar = ProgressBar("seeded")
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=0)
    bar.on_train_begin(None, state, None)
    for step in range(1, 5):
        state.global_step = step
        bar.on_step_end(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 1.5, "itc_loss": 0.25, "learning_rate": 0.1})
    assert bar.bar.n == 4
    bar.on_log(None, state, None, logs={"train_loss": 9.0, "train_runtime": 1.0})  # the line at the end of a run
    assert bar.bar.postfix == "loss=1.50, itc=0.25"
    bar.bar.refresh()
    bar.on_train_end(None, state, None)
    shown = capsys.readouterr().err
    assert "seeded" in shown
    assert "loss=1.50" in shown
    assert "itc=0.25" in shown


def test_other_processes_are_silent(capsys):
    bar = ProgressBar("seeded")
    state = SimpleNamespace(is_world_process_zero=False, max_steps=4, global_step=0)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 1.5})
    bar.on_train_end(None, state, None)
    assert capsys.readouterr().err == ""
