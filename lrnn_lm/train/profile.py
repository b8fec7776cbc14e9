"""`train.profile`: torch's profiler over some steps of the main rank; a trace and a table in its folder."""

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile

from ..recipe.train import ProfileSection
from ..runs.layout import RunFolder

_ROWS = 40  # of the table


class StepProfile:
    """Profiles the steps `at` to `at + steps - 1`. A run that resumes after step `at` profiles nothing.

    Nor does a run without the section, or another rank than the main one.
    """

    def __init__(self, section: ProfileSection | None, run: RunFolder, accelerator: Accelerator):
        self._section, self._run = section if accelerator.is_main_process else None, run
        self._on_gpu = accelerator.device.type == "cuda"
        self._profiler: profile | None = None  # while it runs

    def begins(self, step: int) -> None:
        """Call it before step `step`, counted from 1."""
        if self._section is not None and step == self._section.at:
            gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profiler.start()

    def ends(self, step: int) -> str | None:
        """Call it after step `step`. After the last one it writes the files, and says where."""
        if self._profiler is None or step < self._section.at + self._section.steps - 1:
            return None
        profiler = self._profiler
        self.close()
        by = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=80)
        try:
            self._run.trace.parent.mkdir(exist_ok=True)
            self._run.profile_table.write_text(table + "\n", encoding="utf-8")
            profiler.export_chrome_trace(str(self._run.trace))
        except OSError as error:  # no reason to end the run
            return f"the profile could not be written to {self._run.trace.parent}: {error.strerror}"
        return f"profiled {self._section.steps} steps: {self._run.trace}, {self._run.profile_table}"

    def close(self) -> None:
        """Stop; steps that a signal cut short leave no files."""
        if self._profiler is not None:
            if self._on_gpu:
                torch.cuda.synchronize()
            self._profiler.stop()
            self._profiler = None
