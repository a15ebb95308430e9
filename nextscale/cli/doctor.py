"""The command that checks an installation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Doctor:
    """Check this installation in about a minute: versions, device, fast types and kernels, equal results, processes.

    Each line says pass, slow (right, but a faster way is not in use), fail, or skip (not checked or not installed),
    and what to do. The exit status is 1 when a check fails. Add the output to a report of a problem.
    """

    device: str = "auto"
    """Device to check: cpu, cuda, cuda:1, mps, or auto: cuda where there is one, else mps, else cpu."""
    json: bool = False
    """Print JSON instead of lines: a list of checks with name, status, found, advice and measured values."""

    def run(self) -> None:
        import dataclasses
        import json

        from nextscale.common.errors import ChecksFailedError
        from nextscale.doctor.result import count_status
        from nextscale.doctor.run import diagnose

        results = []
        for result in diagnose(self.device):
            results.append(result)
            if not self.json:
                print(result.format(), flush=True)
        counts = count_status(results)
        if self.json:
            print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
        else:
            print(", ".join(f"{count} {status}" for status, count in counts.items()))
        if counts["fail"]:
            names = ", ".join(result.name for result in results if result.status == "fail")
            raise ChecksFailedError(f"{counts['fail']} of {len(results)} checks failed: {names}")
