"""
Pictures, clips and sounds, decoded with Pillow, PyAV and soundfile from paths, bytes, arrays, file objects and the
`{"bytes": ..., "path": ...}` rows of a `datasets` column.

The functions live with the model whose processor takes all of them, because they travel to the Hub with it.
"""

from ..models.unival.media_unival import load_audio, load_image, load_video, resample, sample_frames

__all__ = ["load_audio", "load_image", "load_video", "resample", "sample_frames"]
