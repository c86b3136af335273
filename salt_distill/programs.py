"""The commands as programs. Nothing is imported before Ctrl-C ends the process at once, as SIGTERM does: an
import that it interrupts would end in Python's traceback. ``command`` takes over when there is work."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def data() -> None:
    """``salt-data``."""
    from salt_distill.common.data.making.cli import main

    main()


def serve() -> None:
    """``salt-serve``."""
    from salt_distill.teacher_server.cli import main

    main()


def train() -> None:
    """``salt-train``."""
    from salt_distill.student_trainer.cli import main

    main()


def evaluate() -> None:
    """``salt-eval``."""
    from salt_distill.student_trainer.evaluation.cli import main

    main()


def plan() -> None:
    """``salt-plan``."""
    from salt_distill.common.plan.cli import main

    main()
