"""hf_vlmerge: merge multimodal transformers and publish the result on the Hugging Face Hub."""

__version__ = "0.1.0"
