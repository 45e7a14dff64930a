"""Functions that replay from a graph: what changes between calls, what a signature is, and why there is no graph."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tdc_fast.graphs import CannotCapture, Graphed, captures_on, graphed, outside_captures, use_capture
from tests.graphs.tape import TapeCapture


@pytest.fixture
def tape():
    capture = TapeCapture()
    with use_capture(capture):
        yield capture


def test_the_first_calls_run_the_next_captures_and_all_later_ones_replay(tape):
    calls = []

    def double(x):
        calls.append(1)
        return 2 * x

    step = Graphed(double, "cpu")
    for value in range(6):
        assert step(torch.full((3,), float(value))).tolist() == [2.0 * value] * 3
    assert len(calls) == 3 and tape.warm_ups == 2 and tape.replays == 4 and step.num_graphs == 1


def test_every_call_has_the_effect_of_one_call(tape):
    model, reference = nn.Linear(2, 1), nn.Linear(2, 1)
    reference.load_state_dict(model.state_dict())

    def step(x, rate, model, total):
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(rate * parameter.grad)
        total += loss.detach()
        return loss.detach()

    total, expected = torch.zeros(()), torch.zeros(())
    quick = Graphed(lambda x, rate: step(x, rate, model, total), "cpu", modules=[model])
    for seed in range(6):
        x, rate = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)), torch.tensor(0.1 / (1 + seed))
        assert torch.equal(quick(x, rate), step(x, rate, reference, expected))
    assert torch.equal(total, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert tape.replays == 4


def test_random_draws_continue_as_those_of_the_function_itself(tape):
    own = torch.Generator().manual_seed(1)
    twin = torch.Generator().manual_seed(1)
    quick = Graphed(lambda: (torch.rand(2), torch.rand(2, generator=own)), "cpu", generators=[own])
    torch.manual_seed(0)
    drawn = [quick() for _ in range(5)]
    after = torch.rand(2)
    torch.manual_seed(0)
    for one, other in drawn:
        assert torch.equal(one, torch.rand(2)) and torch.equal(other, torch.rand(2, generator=twin))
    assert torch.equal(after, torch.rand(2)) and tape.replays == 3


def test_results_are_copies_unless_asked_otherwise(tape):
    copied, shared = Graphed(lambda x: x + 1, "cpu"), Graphed(lambda x: x + 1, "cpu", clone=False)
    for step in (copied, shared):
        step(torch.zeros(1)), step(torch.zeros(1))
    one, two = copied(torch.zeros(1)), copied(torch.ones(1))
    assert (one.item(), two.item()) == (1.0, 2.0)
    one, two = shared(torch.zeros(1)), shared(torch.ones(1))
    assert one is two and one.item() == 2.0


def test_arguments_may_be_nested_and_what_is_no_tensor_counts_by_value(tape):
    def scaled(batch, factor, *, names=()):
        return {"y": batch["x"][0] * factor, "names": names}

    step = Graphed(scaled, "cpu")
    for factor in (2, 3, 2, 3, 2, 3, 2, 3):
        result = step({"x": [torch.ones(1)]}, factor, names=("a",))
        assert result["y"].item() == factor and result["names"] == ("a",)
    assert step.num_graphs == 2


def test_numbers_count_by_their_bits(tape):
    step = Graphed(lambda x, factor: x * factor, "cpu", warmup=1)
    for factor in (0.0, -0.0, 0.0, -0.0, 0.0, -0.0):
        assert step(torch.ones(1), factor).signbit().item() == (str(factor) == "-0.0")
    for _ in range(3):
        assert step(torch.ones(1), float("nan")).isnan().item()
    assert step.num_graphs == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda step, x: step(torch.ones(2)),
        lambda step, x: step(x.double()),
        lambda step, x: step(torch.ones(3, 2).t()[:1]),
        lambda step, x: _under(torch.no_grad(), step, x),
        lambda step, x: _under(torch.autocast("cpu", torch.bfloat16), step, x),
    ],
    ids=["shape", "dtype", "strides", "grad mode", "autocast"],
)
def test_each_signature_has_a_graph_of_its_own(tape, other):
    step, x = Graphed(lambda x: x + 1, "cpu", warmup=1), torch.ones(1, 3)
    step(x), step(x), other(step, x), other(step, x)
    assert step.num_graphs == 2


def test_a_module_that_trains_and_one_that_does_not_have_graphs_of_their_own(tape):
    dropout = nn.Dropout(1.0)
    step = Graphed(dropout, "cpu", modules=[dropout], warmup=1)
    for _ in range(3):
        assert step(torch.ones(2)).tolist() == [0, 0]
    dropout.eval()
    for _ in range(3):
        assert step(torch.ones(2)).tolist() == [1, 1]


def test_a_part_of_a_module_that_trains_counts_too(tape):
    model = nn.Sequential(nn.Dropout(1.0))
    step = Graphed(model, "cpu", modules=[model], warmup=1)
    step(torch.ones(2)), step(torch.ones(2))
    model[0].eval()
    for _ in range(3):
        assert step(torch.ones(2)).tolist() == [1, 1]
    model[0] = nn.Dropout(1.0)
    step.reset()
    for _ in range(3):
        assert step(torch.ones(2)).tolist() == [0, 0]


def attribute(owner, name):
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


SETTINGS = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "matrix precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "TF32 of cuDNN": (*attribute(torch.backends.cudnn, "allow_tf32"), False),
    "cuDNN's determinism": (*attribute(torch.backends.cudnn, "deterministic"), True),
    "determinism": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "fused attention": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
}


@pytest.mark.parametrize(("read", "change", "other"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_of_torch_that_decides_what_is_computed_has_graphs_of_its_own(tape, read, change, other):
    step, before = Graphed(lambda x: (x + 1, read()), "cpu", warmup=1), read()
    step(torch.ones(2)), step(torch.ones(2))
    change(other)
    try:
        assert [step(torch.ones(2))[1] for _ in range(3)] == [other] * 3
    finally:
        change(before)
    assert step(torch.ones(2))[1] == before and step.num_graphs == 2


def _under(context, step, x):
    with context:
        return step(x)


def test_of_more_signatures_than_graphs_the_one_used_longest_ago_is_dropped(tape):
    step = Graphed(lambda x: x + 1, "cpu", warmup=1, max_graphs=2)
    for length in (1, 1, 2, 2, 1, 3, 3):
        step(torch.zeros(length))
    assert step.num_graphs == 2 and len(tape.tapes) == 3
    step(torch.zeros(1))  # still there: it was used after 2
    assert len(tape.tapes) == 3
    step(torch.zeros(2)), step(torch.zeros(2))
    assert len(tape.tapes) == 4


def test_as_many_signatures_as_graphs_all_stay(tape):
    step = Graphed(lambda x: x + 1, "cpu", warmup=1, max_graphs=8)
    for _ in range(3):
        for length in range(1, 9):
            assert step(torch.zeros(length)).sum() == length
    assert step.num_graphs == 8 and [one.replays for one in tape.tapes] == [2] * 8


def test_endless_new_signatures_end_in_one_line_and_the_graphs_there_are_stay(tape, caplog):
    step = Graphed(lambda x: x + 1, "cpu", name="sizes", warmup=1, max_graphs=1)
    for length in (*range(1, 20), 8):
        for _ in range(2):
            assert step(torch.zeros(length)).sum() == length
    assert len(tape.tapes) == 8
    assert [record.message for record in caplog.records] == [
        "sizes: too many signatures; those without a CUDA graph run without one from now on"
    ]
    assert step.num_graphs == 1


def test_weights_that_autocast_has_cast_before_the_capture_are_cast_again_in_every_replay(tape):
    """Around several calls it keeps the copies of the first one, and frees them in the end."""
    model = nn.Linear(1, 1, bias=False)
    step = Graphed(lambda x: model(x).detach(), "cpu", modules=[model], warmup=1)
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, value)
        with torch.autocast("cpu", torch.bfloat16):
            step(torch.ones(1, 1)), step(torch.ones(1, 1))
            assert step(torch.ones(1, 1)).item() == value
            assert model(torch.ones(1, 1)).item() == value  # what the capture made is not left to others
    assert tape.replays == 8


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].register_forward_hook(lambda *_: None)
    return model


def reading(x):
    return x * x.sum().item()


@pytest.mark.parametrize(
    ("function", "modules", "argument", "reason"),
    [
        (lambda x: x, [hooked()], torch.ones(1), "module 0 has hooks"),
        (reading, [], torch.ones(1), "the capture failed: RuntimeError: operation not permitted"),
        (lambda x: x * 2, [], torch.ones(1, requires_grad=True), "an argument requires a gradient"),
        (nn.Linear(1, 1), [], torch.ones(1), "its result requires a gradient"),
        (lambda x, y=None: x, [], [torch.ones(1), bytearray(b"1")], "has no hash"),
        (lambda x: x, [], torch.ones(1, device="meta"), "an argument is on meta, not on cpu"),
        (lambda x: x.add_(1), [], torch.ones(1), "it writes into an argument"),
    ],
    ids=["hook", "item", "gradient of an input", "gradient of a result", "unhashable", "device", "in place"],
)
def test_what_cannot_be_captured_runs_as_it_is_and_one_line_says_why(tape, caplog, function, modules, argument, reason):
    step = Graphed(function, "cpu", name="step", modules=modules)
    for _ in range(5):
        step(argument)
    assert reason in step.why_not and step.num_graphs == 0
    assert [record.message for record in caplog.records] == [f"step runs without a CUDA graph: {step.why_not}"]


def test_what_must_be_captured_and_cannot_is_an_error(tape):
    step = Graphed(reading, "cpu", name="step", required=True)
    step(torch.ones(1)), step(torch.ones(1))
    with pytest.raises(CannotCapture, match=r"step cannot run as a CUDA graph: the capture failed"):
        step(torch.ones(1))


def test_a_failed_capture_leaves_no_effect(tape):
    count = torch.zeros(())

    def step(x):
        count.add_(1)
        return torch.rand(()) if x.sum().item() else x

    quick = Graphed(step, "cpu")
    for _ in range(4):
        quick(torch.ones(1))
    assert count == 4 and quick.why_not


def test_without_graphs_on_the_device_the_function_runs_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO)
    assert not captures_on(torch.device("cpu"))
    function = lambda x: x + 1  # noqa: E731
    assert graphed(function, "cpu") is function
    step = Graphed(function, "cpu", name="step")
    assert step(torch.zeros(1)).item() == 1
    assert [record.message for record in caplog.records] == [
        "step runs without a CUDA graph: there are no CUDA graphs on cpu"
    ]
    with pytest.raises(CannotCapture, match="no CUDA graphs on cpu"):
        Graphed(function, "cpu", required=True)


def test_a_graphed_function_inside_another_is_part_of_its_graph(tape):
    inner = Graphed(lambda x: x + 1, "cpu", warmup=1)
    outer = Graphed(lambda x: inner(x) * 2, "cpu", warmup=2)
    assert [outer(torch.full((1,), float(i))).item() for i in range(5)] == [2, 4, 6, 8, 10]
    assert len(tape.tapes) == 2


@pytest.mark.parametrize("fixed", [True, False])
def test_flops_are_counted_in_every_call(tape, fixed):
    weight = torch.ones(3, 5)
    step = Graphed(lambda x: x @ weight, "cpu", warmup=1, fixed_flops=fixed)
    step(torch.ones(2, 3)), step(torch.ones(2, 3))  # captured before anybody counts
    with FlopCounterMode(display=False) as counter:
        for calls in range(1, 5):
            assert torch.equal(step(torch.full((2, 3), float(calls))), torch.full((2, 5), 3.0 * calls))
            assert counter.get_total_flops() == calls * 2 * 2 * 3 * 5
    assert tape.replays == (4 if fixed else 1)
    counted = Graphed(nn.Linear(3, 5).requires_grad_(False), "cpu", warmup=1, fixed_flops=fixed)
    with FlopCounterMode(display=False) as counter:
        for _ in range(4):
            counted(torch.ones(2, 3))
    assert counter.get_total_flops() == 4 * 2 * 2 * 3 * 5 and counted.num_graphs == fixed


def test_another_dispatch_mode_sees_the_function_itself(tape):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(operator._schema.name)
            return operator(*args, **(kwargs or {}))

    names: list[str] = []
    step = Graphed(lambda x: x.neg(), "cpu", warmup=1)
    step(torch.ones(1)), step(torch.ones(1))
    with Log():
        step(torch.ones(1))
    assert "aten::neg" in names and tape.replays == 1


def test_after_a_reset_replaced_weights_are_read(tape):
    model = nn.Linear(1, 1, bias=False)
    step = Graphed(lambda x: model(x).detach(), "cpu", modules=[model], warmup=1)
    step(torch.ones(1)), step(torch.ones(1))
    model.weight = nn.Parameter(torch.full((1, 1), 5.0))
    step.reset()
    assert [step(torch.ones(1)).item() for _ in range(3)] == [5.0] * 3


def test_threads_take_turns(tape):
    step = Graphed(lambda x: (x * 2).sum(), "cpu", warmup=1)
    wrong = []

    def work(value: float) -> None:
        for _ in range(50):
            if step(torch.full((4,), value)).item() != 8 * value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with outside_captures():  # may be entered while nothing is captured
        pass


@pytest.mark.parametrize("argument", ["warmup", "max_graphs"])
def test_numbers_below_one_are_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        Graphed(lambda: None, "cpu", **{argument: 0})
