# Copyright 2026 The hf_vlmerge authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The media in chats: a row of a batch for each chat, whatever its parts call their source."""

from collections.abc import Mapping
from typing import Any

ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}  # of the processor


def media_of_chats(conversation: Any) -> dict[str, list]:
    """
    Images, videos and sounds as the processor takes them: for each kind that occurs one entry a chat, None where it has
    none. A part `{"type": "image", ...}` has its source under "image" (or "video", "audio"), "url", "path" or "base64".

    Args:
        conversation: a list of messages, or a list of such lists.

    Raises:
        ValueError: a chat has more than one medium.
    """
    chats = [_messages(each) for each in conversation] if _is_batch(conversation) else [_messages(conversation)]
    media: dict[str, list] = {}
    for row, chat in enumerate(chats):
        found = [part for message in chat for part in _parts(message)]
        if len(found) > 1:
            raise ValueError(f"chat {row} has {len(found)} media; a row takes one.")
        for kind, source in found:
            media.setdefault(ARGUMENTS[kind], [None] * len(chats))[row] = source
    return media


def _is_batch(conversation: Any) -> bool:
    return len(conversation) > 0 and not isinstance(conversation[0], Mapping)


def _messages(chat: Any) -> list:
    """The pipelines of the library wrap them."""
    return getattr(chat, "messages", chat)


def _parts(message: Mapping) -> list[tuple[str, Any]]:
    """Kind and source of each medium of a message; parts without a source only say where one belongs."""
    content, found = message.get("content"), []
    for part in content if isinstance(content, (list, tuple)) else ():
        kind = part.get("type")
        if kind == "image_url":
            link = part["image_url"]
            found.append(("image", link["url"] if isinstance(link, Mapping) else link))
        elif kind in ARGUMENTS:
            sources = [part[key] for key in (kind, "url", "path", "base64") if part.get(key) is not None]
            found += [(kind, source) for source in sources[:1]]
    return found


__all__ = ["media_of_chats"]
