import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.per_sample import fastest
from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.choice import methods_within
from tests.per_sample.loop import assert_equals_the_loop, draw
from tests.tolerances import assert_close


class TestBenchmark:
    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fastest, "MEASURED", {})

    def test_the_fastest_is_taken_and_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timed = []

        def measure(method: str, tensors: list[Tensor], case: Case) -> float:
            timed.append(method)
            return 1.0 if method == "mixture" else 2.0

        monkeypatch.setattr(fastest, "_milliseconds", measure)
        tensors = draw()
        for _ in range(2):
            assert_equals_the_loop(tensors, "benchmark", padding=1)
        assert sorted(timed) == ["chunked", "grouped", "matmul", "mixture"]
        assert list(fastest.MEASURED.values()) == ["mixture"]
        with torch.no_grad():
            dynamic_conv2d(*tensors, padding=1, method="benchmark")
        assert [case.training for case, *_ in fastest.MEASURED] == [True, False]

    def test_the_layout_is_the_one_that_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        strides = []

        def measure(method: str, tensors: list[Tensor], case: Case) -> float:
            strides.append(tensors[0].stride())
            return 1.0

        monkeypatch.setattr(fastest, "_milliseconds", measure)
        input, routing, weight, _ = draw(kernel_size=(1, 1))
        dynamic_conv2d(input, routing, weight, stride=2, method="benchmark")
        assert set(strides) == {input[:, :, ::2, ::2].stride()}

    def test_a_kernel_that_does_not_run_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # There is no GPU here: asked for on a CPU, triton refuses.
        monkeypatch.setattr(fastest, "methods_within", lambda case: ["triton", "matmul"])
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.warns(UserWarning, match="method='triton' does not run here, so another is taken: .* CUDA"):
            assert_equals_the_loop(draw(), "benchmark")
        assert list(fastest.MEASURED.values()) == ["matmul"]

    def test_a_method_that_takes_more_memory_than_a_gpu_has_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def measure(method: str, tensors: list[Tensor], case: Case) -> float:
            if method != "chunked":
                raise torch.OutOfMemoryError(method)
            return 1.0

        monkeypatch.setattr(fastest, "_milliseconds", measure)
        assert_equals_the_loop(draw(), "benchmark", padding=1)
        assert list(fastest.MEASURED.values()) == ["chunked"]

    def test_each_shape_and_number_of_threads_is_timed(self) -> None:
        tensors, before = draw(), torch.get_num_threads()
        dynamic_conv2d(*tensors, padding=1, method="benchmark")
        dynamic_conv2d(*tensors, method="benchmark")
        torch.set_num_threads(before + 1)
        try:
            dynamic_conv2d(*tensors, method="benchmark")
        finally:
            torch.set_num_threads(before)
        dynamic_conv2d(*tensors, method="benchmark")
        assert len(fastest.MEASURED) == 3

    def test_compiled_it_is_auto(self) -> None:
        torch.compiler.reset()
        tensors = draw()
        compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend="aot_eager")
        found = compiled(*tensors, padding=1, method="benchmark")
        assert_close(found, dynamic_conv2d(*tensors, padding=1))
        assert not fastest.MEASURED

    def test_leaves_no_gradient(self) -> None:
        tensors = draw()
        dynamic_conv2d(*tensors, method="benchmark")
        assert len(fastest.MEASURED) == 1
        assert all(tensor.grad is None for tensor in tensors)

    def test_keeps_within_the_bytes(self) -> None:
        dynamic_conv2d(*draw(), method="benchmark", max_mixed_bytes=1)
        assert list(fastest.MEASURED.values()) == ["chunked"]

    def test_what_is_around_does_not_see_it(self) -> None:
        tensors = draw()
        packed: list[Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
            FlopCounterMode(display=False) as counter,
        ):
            y = dynamic_conv2d(*tensors, method="benchmark")
            count, flops = len(packed), counter.get_total_flops()
            dynamic_conv2d(*tensors, method="benchmark")
        assert (len(packed), counter.get_total_flops()) == (2 * count, 2 * flops)
        fastest.MEASURED.clear()
        again = checkpoint(lambda *t: dynamic_conv2d(*t, method="benchmark"), *tensors, use_reentrant=False)
        assert_close(torch.autograd.grad(again.sum(), tensors), torch.autograd.grad(y.sum(), tensors))

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
    def test_under_a_function_transform_there_is_nothing_to_time(self) -> None:
        input, routing, weight, _ = (tensor.detach() for tensor in draw())
        torch.func.jvp(lambda x: dynamic_conv2d(x, routing, weight, method="benchmark"), (input,), (input,))
        assert not fastest.MEASURED

    def test_unfolded_inputs_count(self) -> None:
        dynamic_conv2d(*draw(8, (28, 28)), method="benchmark", max_mixed_bytes=40_000)
        assert not {"matmul", "mixture"} & set(fastest.MEASURED.values())
        ((case, *_),) = fastest.MEASURED
        assert methods_within(case) == ["grouped", "chunked"]

    def test_features_of_inference_mode(self) -> None:
        input, routing, weight, _ = draw()
        with torch.inference_mode():
            features = input * 2
        y = dynamic_conv2d(features, routing.detach(), weight.detach(), method="benchmark")
        assert_close(y, dynamic_conv2d(input, routing, weight, method="grouped").mul(2).detach())

    def test_features_of_inference_mode_are_timed_to_train_the_routing(self) -> None:
        # The mixture alone keeps no features for the gradient. The others fail where they run, as a convolution does
        # whose weight is trained on such features: timing them does not.
        input, routing, weight, _ = draw()
        with torch.inference_mode():
            features = input * 2
        with contextlib.suppress(RuntimeError):
            dynamic_conv2d(features, routing, weight.detach(), method="benchmark")
        assert len(fastest.MEASURED) == 1

    def test_inference_mode(self) -> None:
        tensors = draw()
        with torch.inference_mode():
            y = dynamic_conv2d(*tensors, method="benchmark")
        assert_close(y, dynamic_conv2d(*tensors, method="grouped").detach())
