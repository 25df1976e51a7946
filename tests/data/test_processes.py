"""Real processes, each reading its own examples, find what one does; a process that is lost ends
the others."""

import signal

import pytest
import scenarios
from processes import Processes, run


def alone(deal, count, **settings):
    """What one process on one device makes of the joined batches."""
    return scenarios.results(scenarios.weights(), scenarios.dealt(deal, count)[1], **settings)


@pytest.mark.parametrize(
    ("count", "deal", "layout", "settings"),
    [
        (2, "even", "replicated", {"kind": "placed", "microbatch": 4}),
        (2, "uneven", "fsdp", {"microbatch": 4}),
        (4, "fewer", "fsdp", {"kind": "alternating"}),
        (2, "fewer", "replicated", {"data_axis": None, "more": True}),
    ],
)
def test_processes_find_what_one_finds_on_all_their_examples(
    count, deal, layout, settings, tmp_path
):
    found = run(
        "scenarios:density", count, tmp_path, limit=300, deal=deal, layout=layout, **settings
    )
    assert all(
        one == found[0] for one in found
    )  # not to rounding: every process must take the same decisions
    scenarios.assert_same(found[0], alone(deal, count, more=settings.get("more", False)))


def test_batches_that_cannot_be_joined_are_refused_in_all_processes_naming_the_one(tmp_path):
    first, second = run("scenarios:refused", 2, tmp_path, limit=300)
    assert first == second
    nothing, ragged, other, cut = first
    assert nothing.startswith(
        "data: process 1 of 2, batch 0: no batch; expected at least one in each process"
    )
    assert ragged.startswith(
        "data: process 1 of 2, batch 0: leaves of different lengths, which cannot be joined"
    )
    assert other.startswith("data: process 1 of 2, batch 0: 4 examples, with other leaves, dtypes")
    assert cut.startswith(
        "data: batch 1 has 0 + 3 examples, which the 4 devices of the mesh axis 'data' do not "
        "divide"
    )


# A process that is lost: the others end by themselves, in the time that `start` and `watch` state -

TIMEOUT = 10


@pytest.mark.parametrize(
    ("event", "said"),
    [("kill", ""), ("stop", ""), ("stall", "in loader"), ("fail", "OSError: this disk is gone")],
)
def test_the_others_end_with_an_error_in_bounded_time(event, said, tmp_path):
    options = {"heartbeat_timeout": TIMEOUT, "shutdown_timeout": TIMEOUT}
    with Processes("scenarios:rounds", 2, tmp_path, options=options, **{event: 1}) as processes:
        processes.wait_for(1, "under way", limit=300)
        if event in ("kill", "stop"):
            processes.signal(1, signal.SIGKILL if event == "kill" else signal.SIGSTOP)
        (other,) = processes.wait(2 + 3 * TIMEOUT, only=[0])
    assert other.code != 0
    assert "This most likely indicates that another task died" in other.output, other.output
    assert said in processes.output(1)
