"""Has the module kafka_rebalance take step after step, and prints how far things are."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

PAUSE = 3.0  # seconds between two steps

display = Display()


class ActionModule(ActionBase):  # type: ignore[misc]
    """Runs where the play does; each step is a short call of the module on its host."""

    def run(
        self, tmp: str | None = None, task_vars: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Take steps until one says that all is done, or none has made any progress for long."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        takes_steps = self._task.args.get("state") == "moved" and not self._task.check_mode
        changed, said, fewest, since = False, "", None, time.monotonic()
        while True:
            step: dict[str, Any] = self._execute_module(task_vars=task_vars)
            changed |= step.get("changed", False)
            # Later a step may fail: the broker that was asked restarts, or another one is down.
            is_refused = step.get("failed", False) and not said
            if not takes_steps or step.get("done") or is_refused:
                return result | step | {"changed": changed}
            if step["msg"] != said:
                said = step["msg"]
                display.display(f"{time.strftime('%H:%M:%S')} {said}")
                # More is no progress: what is produced meanwhile is copied too.
                remaining = step.get("remaining")
                if remaining is None or fewest is None or remaining < fewest:
                    fewest, since = remaining, time.monotonic()
            waited = time.monotonic() - since
            if waited > float(self._task.args.get("patience", 600)):
                text = f"No progress for {waited:.0f} s: {said}"
                return result | step | {"failed": True, "changed": changed, "msg": text}
            time.sleep(PAUSE)
