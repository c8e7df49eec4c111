"""Which chat template an answer is asked for with: what a model was trained with is what it is served with."""

from __future__ import annotations

import functools
from pathlib import Path

from trainers.chat import Chat
from trainers.errors import ModelError
from trainers.records import TEMPLATE_FILE


class Chats:
    """The base's chat, and those of adapters whose folders carry another template. Thread-safe."""

    def __init__(self, model_dir: Path) -> None:
        self.base = Chat.load(model_dir)
        self._with = functools.lru_cache(maxsize=16)(lambda template: Chat.load(model_dir, template))

    def of(self, adapter: str | None) -> Chat:
        """The chat of an adapter's folder (None: the bare base). Reads a small file. Raises TemplateError for an unusable template."""
        if adapter is None:
            return self.base
        try:
            template = Path(adapter, TEMPLATE_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:  # an adapter that another trainer made; a missing folder is the engine's to report
            return self.base
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{Path(adapter).name}: its chat template cannot be read ({error}).", "Mend or remove the file.") from None
        return self.base if template == self.base.template else self._with(template)
