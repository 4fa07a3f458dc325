"""The simulated driver's time: asynchronous launches, streams, events, slices between processes, the time scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sim_machine import Machine, finish, line


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    options: dict[str, Any] = getattr(request, "param", {})
    made = Machine(**options)
    yield made
    made.close()


@pytest.mark.parametrize("machine", [{"time_scale": 10}], indirect=True)
def test_launches_return_at_once_and_take_their_time(machine: Machine) -> None:
    machine.run(
        """
        f, s, a, b = cuda.function("spin_2ms"), cuda.make("cuStreamCreate", 0), cuda.event(), cuda.event()
        start = time.monotonic()
        cuda.call("cuEventRecord", a, s)
        for _ in range(50): cuda.launch(f, s)
        cuda.call("cuEventRecord", b, s)
        submitted = time.monotonic() - start
        assert cuda.lib.cuStreamQuery(s) == NOT_READY and cuda.lib.cuEventQuery(b) == NOT_READY
        assert submitted < 0.5, submitted
        cuda.call("cuStreamSynchronize", s)
        wall = time.monotonic() - start
        assert wall >= 1, wall
        assert 100 <= cuda.elapsed_ms(a, b) < 110, cuda.elapsed_ms(a, b)
        assert cuda.lib.cuStreamQuery(s) == 0
        """
    )


@pytest.mark.parametrize("machine", [{"time_scale": 10}], indirect=True)
def test_time_scale_stretches_the_clock_and_not_device_time(machine: Machine) -> None:
    machine.run(
        """
        f, a, b = cuda.function("spin_2ms"), cuda.event(), cuda.event()
        start = time.monotonic()
        cuda.call("cuEventRecord", a, None); cuda.launch(f); cuda.launch(f); cuda.call("cuEventRecord", b, None)
        cuda.call("cuCtxSynchronize")
        assert 0.04 <= time.monotonic() - start < 0.2
        assert 4 <= cuda.elapsed_ms(a, b) < 4.5, cuda.elapsed_ms(a, b)
        """
    )


@pytest.mark.parametrize("machine", [{"time_scale": 50}], indirect=True)
def test_duration_comes_from_name_parameter_and_table(machine: Machine) -> None:
    machine.run(
        """
        def ms(name, **launch):
            a, b, f = cuda.event(), cuda.event(), cuda.function(name)
            cuda.call("cuEventRecord", a, None); cuda.launch(f, **launch); cuda.call("cuEventRecord", b, None)
            cuda.call("cuCtxSynchronize")
            return cuda.elapsed_ms(a, b)
        assert 3 <= ms("kernel_3ms") < 3.3
        assert 1.5 <= ms("busy_1500us_a") < 1.8
        assert 2.5 <= ms("wait_arg_us", first=2500) < 2.8
        assert 4 <= ms("gemm_f32") < 4.3
        assert ms("add") < 0.3
        """,
        NBGPU_SIM_KERNELS="gemm*=4ms",
    )


def test_streams_are_in_order_and_legacy_waits_for_blocking_ones(machine: Machine) -> None:
    machine.run(
        """
        slow = cuda.function("spin_20ms")
        blocking, free = cuda.make("cuStreamCreate", 0), cuda.make("cuStreamCreate", 1)
        after_legacy, after_free = cuda.event(), cuda.event()
        cuda.launch(slow, blocking)
        cuda.call("cuEventRecord", after_free, free)    # independent: at once
        cuda.call("cuEventRecord", after_legacy, None)  # behind the blocking stream
        assert cuda.lib.cuEventQuery(after_free) == 0
        assert cuda.lib.cuEventQuery(after_legacy) == NOT_READY
        cuda.call("cuEventSynchronize", after_legacy)
        assert cuda.elapsed_ms(after_free, after_legacy) > 19
        """
    )


def test_per_thread_default_stream_is_another_stream(machine: Machine) -> None:
    machine.run(
        """
        slow = cuda.function("spin_20ms")
        params = (c.c_void_p * 1)(0)
        cuda.call("cuLaunchKernel_ptsz", slow, 1, 1, 1, 32, 1, 1, 0, None, params, None)
        other = cuda.make("cuStreamCreate", 0)
        assert cuda.lib.cuStreamQuery(other) == 0
        assert cuda.lib.cuStreamQuery(c.c_void_p(2)) == NOT_READY  # CU_STREAM_PER_THREAD
        assert cuda.lib.cuStreamQuery_ptsz(None) == NOT_READY
        cuda.call("cuStreamSynchronize", c.c_void_p(2))
        assert cuda.lib.cuStreamQuery_ptsz(None) == 0
        """
    )


def test_waiting_for_an_event_orders_two_streams(machine: Machine) -> None:
    machine.run(
        """
        slow, one, two = cuda.function("spin_20ms"), cuda.make("cuStreamCreate", 1), cuda.make("cuStreamCreate", 1)
        done, after = cuda.event(), cuda.event()
        cuda.launch(slow, one); cuda.call("cuEventRecord", done, one)
        cuda.call("cuStreamWaitEvent", two, done, 0); cuda.call("cuEventRecord", after, two)
        assert cuda.lib.cuEventQuery(after) == NOT_READY
        cuda.call("cuEventSynchronize", after)
        assert cuda.lib.cuEventQuery(done) == 0 and abs(cuda.elapsed_ms(done, after)) < 1
        """
    )


def test_queue_holds_1024_and_then_blocks(machine: Machine) -> None:
    machine.run(
        """
        f = cuda.function("spin_100us")
        start = time.monotonic()
        for _ in range(1000): cuda.launch(f)
        free = time.monotonic() - start
        for _ in range(1000): cuda.launch(f)
        full = time.monotonic() - start
        assert full > 0.095, (free, full)
        assert free < full / 2, (free, full)
        """
    )


def test_host_function_runs_in_its_turn_and_later_copies_see_it(machine: Machine) -> None:
    machine.run(
        """
        FN = c.CFUNCTYPE(None, c.c_void_p)
        source, target, p = c.create_string_buffer(b"before"), c.create_string_buffer(6), cuda.alloc(6)
        times = []
        def change(_):
            times.append(time.monotonic()); source.raw = b"after!\\0"
        fn, s, start = FN(change), cuda.make("cuStreamCreate", 0), time.monotonic()
        cuda.launch(cuda.function("spin_30ms"), s)
        cuda.call("cuLaunchHostFunc", s, fn, None)
        cuda.call("cuMemcpyHtoDAsync_v2", p, source, c.c_size_t(6), s)
        cuda.call("cuMemcpyDtoHAsync_v2", target, p, c.c_size_t(6), s)
        assert not times
        cuda.call("cuStreamSynchronize", s)
        assert times[0] - start >= 0.03 and target.raw == b"after!", (times, target.raw)
        """
    )


BUSY = """
f, a, b = cuda.function("spin_1ms"), cuda.event(), cuda.event()
print("ready", flush=True); sys.stdin.readline()
cuda.call("cuEventRecord", a, None)
for _ in range(100): cuda.launch(f)
cuda.call("cuEventRecord", b, None); cuda.call("cuCtxSynchronize")
print(cuda.elapsed_ms(a, b))
"""


def run_together(machine: Machine, count: int) -> list[float]:
    programs = [machine.start(BUSY) for _ in range(count)]
    for program in programs:
        assert line(program) == "ready"
    for program in programs:
        assert program.stdin
        program.stdin.write("go\n")
        program.stdin.flush()
    return [float(finish(program)) for program in programs]


@pytest.mark.slow
@pytest.mark.parametrize("machine", [{"time_scale": 5, "slice_us": 2000, "switch_us": 500}], indirect=True)
def test_two_processes_take_turns_and_pay_for_switches(machine: Machine) -> None:
    """100 ms of work each, slices of 2 ms, a switch of 0.5 ms: together 250 ms, and event time says so."""
    alone = run_together(machine, 1)[0]
    both = run_together(machine, 2)
    assert 100 <= alone < 102
    assert max(both) > 225, both
    assert max(both) < 260, both
    assert min(both) > 180, both  # they took turns: neither ran first and alone


@pytest.mark.parametrize("machine", [{"time_scale": 5, "slice_us": 2000, "switch_us": 0}], indirect=True)
def test_control_switches_that_cost_nothing(machine: Machine) -> None:
    both = run_together(machine, 2)
    assert 185 < max(both) < 206, both
