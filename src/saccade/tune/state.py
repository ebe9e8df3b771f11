"""What a tuning run has found so far, kept on disk after each step, so that a killed run continues."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

VERSION = 1


class RunState:
    """Results by stage and key, in one JSON file that is replaced whole.

    Args:
        path: The file.
        arguments: What the run was asked to do; a file of other arguments is not continued.

    Raises:
        RuntimeError: If the file cannot be written.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        self.path = path
        self.identity = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
        self.stages: dict[str, dict[str, Any]] = {}
        self.resumed = self._load()

    def _load(self) -> bool:
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not isinstance(tree, dict) or tree.get("version") != VERSION or tree.get("identity") != self.identity:
            return False
        stages = tree.get("stages")
        if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
            return False
        self.stages = stages
        return bool(stages)

    def get(self, stage: str, key: str) -> Any | None:
        """What was found, or None."""
        return self.stages.get(stage, {}).get(key)

    def put(self, stage: str, key: str, value: Any) -> None:
        """Keep a result and write the file.

        Args:
            stage: Of the run.
            key: Within the stage.
            value: Plain data.

        Raises:
            RuntimeError: If the file cannot be written; the one before is still there.
        """
        self.stages.setdefault(stage, {})[key] = value
        part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(
                json.dumps({"version": VERSION, "identity": self.identity, "stages": self.stages}), encoding="utf-8"
            )
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RuntimeError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """The run is finished: the next one measures anew."""
        self.path.unlink(missing_ok=True)
