"""Runs a model over the user's data and counts what its layers meet."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any

import torch

from ..calibration import Calibration, layer_name
from ..errors import ModelError
from ..options import Progress, reporter, resolve_threads
from .batches import Batch, naming

__all__ = [
    "Loss",
    "as_tokens",
    "calibrate",
    "check_batches",
    "is_conv1d",
    "is_embedding",
    "is_linear",
    "prepared",
    "reading",
]

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    names: str | Sequence[str] | None = None,
    held_out: int | None = 8,
    gradients: int = 16,
    loss: Loss | None = None,
    max_bytes: int | None = None,
    progress: Progress | bool | None = True,
    threads: int | None = None,
) -> Calibration:
    """Counts the statistics that calibrated compression needs, over the user's own data.

    The model runs in eval mode over all batches; of every linear layer (torch's Linear and
    transformers' Conv1D) the moments of the input are counted, of every embedding the use of its
    rows. Layers that read the very same tensor (query, key, value; up, gate) are counted once.

    Parameters
    ----------
    model
        A torch module. Its parameters, flags and hooks are afterwards as they were.
    batches
        An iterable of batches: mappings of keyword arguments (as tokenizers return them), tuples of
        positional arguments, or single tensors (token ids). A 2-D ``attention_mask`` of 0 and 1 in
        a batch leaves out padding; inputs whose leading shape is not the mask's (a pooler's, or a
        model's that removes padding itself) are counted whole.
    names
        Shell patterns of the layers to count ("*.mlp.*"); None counts all, output heads included.
    held_out
        Every held_out-th sequence is kept apart to judge fits on; see ``Calibration``.
    gradients
        On how many sequences, the first ones, to take the loss's gradient at the layers' outputs,
        whose mean squares say what an error there costs (one forward and backward pass each); 0 for
        none.
    loss
        ``loss(model, batch)``, a scalar tensor, of a batch with one sequence. By default the
        model's own, summed over tokens: its ``loss`` where the batch has labels, the next token's
        cross entropy for a causal language model. For others, without labels, random projections of
        the output, sum over tokens of <r, h> / |h| with r of random signs, so that the mean squares
        of gradients say what an error adds to the relative squared error of the output.
    max_bytes
        Most bytes for matrices in memory. The matrices take 2 * 8 * d^2 bytes (without held-out
        rows half) for each distinct input of d numbers. Where that is more, layers are counted in
        groups, with one pass over the batches for each (an iterator will not do then), and the
        groups that are done wait in temporary files.
    progress
        True for a bar on standard error, or a function called with (done, total, name); total is 0
        where the number of batches is not known.
    threads
        Number of threads for the sums; by default as many as processors. No result depends on it.

    Returns
    -------
    Calibration
        Layers by their names in the model. Those that no batch reaches are not in it.

    Raises
    ------
    ModelError
        (ValueError) no such layer, a batch that the model does not take, a loss that is not one.
    TensorError
        (ValueError) NaN or Inf in activations or gradients, a mask of other numbers than 0 and 1.
    TypeError
        Arguments of other kinds.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    check_batches(batches)
    for argument, value in (("gradients", gradients), ("max_bytes", max_bytes)):
        if isinstance(value, bool) or not isinstance(value, (int, type(None))):
            raise TypeError(f"{argument}={value!r}: expected a whole number")
        if value is not None and value < 0:
            raise ValueError(f"{argument}={value}: expected 0 or more")
    calibration = Calibration(held_out=held_out)
    layers = _find_layers(model, names)
    workers = resolve_threads(threads)
    with reporter(progress, "calibrating") as report, prepared(model):
        iterator = iter(batches)
        try:
            first = next(iterator)
        except StopIteration:
            raise ModelError("there are no batches: a calibration needs data") from None
        collector = _Collector(model, calibration, layers, workers)
        collector.find_shared(Batch(model, first, 0))
        groups = collector.groups(max_bytes)
        if len(groups) > 1 and iterator is batches:
            raise TypeError(
                f"max_bytes={max_bytes} takes {len(groups)} passes over the batches, and an "
                "iterator gives one: pass a list, a DataLoader, or a larger max_bytes"
            )
        passes = len(batches) if isinstance(batches, Sized) else 0
        total = passes * len(groups)
        done = 0
        for i, group in enumerate(groups):
            wanted = (gradients or 0) if i == 0 else 0
            for j, value in enumerate(chain([first], iterator) if i == 0 else batches):
                batch = Batch(model, value, j)
                collector.count(batch, group, embeddings=i == 0)
                sequences = batch.sequences(wanted)
                for sequence in sequences:
                    collector.differentiate(sequence, loss)
                wanted -= len(sequences)
                done += 1
                report(done, max(total, done) if total else 0, f"pass {i + 1} of {len(groups)}")
            if len(groups) > 1:
                calibration._spill(group)
    if not len(calibration):
        raise ModelError(
            f"none of the {len(layers)} layers saw an input: the model's forward pass does not "
            "call them"
        )
    return calibration


def check_batches(batches: Any) -> None:
    """TypeError for a single batch, whose parts a loop would take for batches."""
    if isinstance(batches, (Mapping, torch.Tensor, str)):
        raise TypeError(
            f"batches: expected an iterable of batches, got one {type(batches).__name__}: pass a "
            "list of it"
        )


# ---- the model ----------------------------------------------------------------------------------


def is_linear(module: torch.nn.Module) -> bool:
    """torch's Linear or transformers' Conv1D."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def is_conv1d(module: torch.nn.Module) -> bool:
    """transformers' Conv1D with its (in x out) weight."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2
    )


def is_embedding(module: torch.nn.Module) -> bool:
    """An embedding called with ids. Subclasses with a forward of their own (learned positions with
    an offset) take something else."""
    return (
        isinstance(module, torch.nn.Embedding)
        and type(module).forward is torch.nn.Embedding.forward
    )


def _find_layers(
    model: torch.nn.Module, names: str | Sequence[str] | None
) -> dict[str, torch.nn.Module]:
    layers = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) or is_embedding(module)
    }
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layer or embedding to calibrate")
    if names is None:
        return layers
    patterns = [layer_name(name) for name in ([names] if isinstance(names, str) else names)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            near = difflib.get_close_matches(pattern, layers, 3, 0.4) or list(layers)[:3]
            raise ModelError(f"no layer is called {pattern!r}; some are {', '.join(near)}")
    return {
        name: module
        for name, module in layers.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


@contextmanager
def prepared(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode, no gradients of parameters, and nothing compiled, as hooks are to see what they
    are told; afterwards as before, whatever happens."""
    training = {module: module.training for module in model.modules()}
    required = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter in required:
            parameter.requires_grad_(True)


# ---- counting -----------------------------------------------------------------------------------


class _Seen:
    """Tensors met in one forward pass, told apart by identity. Weak references, as memory that is
    freed is soon used again, and versions, as tensors change in place."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[weakref.ref[torch.Tensor], int, list[Any]]] = {}

    def labels(self, x: torch.Tensor) -> list[Any]:
        """A list that belongs to this tensor as it is now; empty at first."""
        known = self._met.get(id(x))
        if known is None or known[0]() is not x or known[1] != x._version:
            known = self._met[id(x)] = (weakref.ref(x), x._version, [])
        return known[2]


class _Collector:
    def __init__(
        self,
        model: torch.nn.Module,
        calibration: Calibration,
        layers: Mapping[str, torch.nn.Module],
        threads: int,
    ) -> None:
        self.model, self.calibration, self.threads = model, calibration, threads
        self.linear = {name: module for name, module in layers.items() if is_linear(module)}
        self.embeddings = {name: m for name, m in layers.items() if name not in self.linear}
        self.sources: dict[str, str] = {}  # of layers that share their input
        self.generator = torch.Generator().manual_seed(0)  # of the random projections

    def find_shared(self, batch: Batch) -> None:
        """Layers that in every call of a pass read the same tensor as another one."""
        seen = _Seen()
        calls: dict[str, list[int]] = {}

        def note(name: str, x: torch.Tensor) -> None:
            labels = seen.labels(x)
            if not labels:
                labels.append(len(numbered))
                numbered.append(None)
            calls.setdefault(name, []).append(labels[0])

        numbered: list[None] = []
        self._forward(batch, dict.fromkeys(self.linear, note))
        first: dict[tuple[int, ...], str] = {}
        for name in calls:
            source = first.setdefault(tuple(calls[name]), name)
            if source != name:
                self.sources[name] = source

    def groups(self, max_bytes: int | None) -> list[list[str]]:
        """Layers with an input of their own, whose matrices fit in memory together."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, module in self.linear.items():
            if name in self.sources:
                continue
            needed = 8 * _width(module) ** 2 * (2 if self.calibration.held_out else 1)
            if max_bytes is not None and needed > max_bytes:
                raise ValueError(
                    f"max_bytes={max_bytes}: the matrices of {name!r} alone take {needed} bytes"
                )
            if max_bytes is not None and size + needed > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += needed
        return groups

    def count(self, batch: Batch, group: Sequence[str], embeddings: bool) -> None:
        """One forward pass that adds up the group's inputs, and what embeddings read."""
        seen = _Seen()

        def add(name: str, x: torch.Tensor) -> None:
            seen.labels(x).append(name)
            x, mask = as_tokens(batch, name, x)
            self.calibration.update(name, x, mask, threads=self.threads)

        def compare(name: str, x: torch.Tensor) -> None:
            source = self.sources[name]
            if source not in seen.labels(x):
                raise ModelError(
                    f"{name!r} read the same input as {source!r} in batch 0 but not here: "
                    "calibrate them apart, with names="
                )
            self.calibration.share(name, source)

        def add_ids(name: str, ids: torch.Tensor) -> None:
            stream = batch.tokens(name, ids.shape)
            weight = self.embeddings[name].weight
            assert isinstance(weight, torch.Tensor)
            ids = ids.reshape(stream.shape)
            self.calibration.update_tokens(name, ids, len(weight), stream.mask)

        actions: dict[str, Callable[[str, torch.Tensor], None]] = dict.fromkeys(group, add)
        actions |= {name: compare for name, source in self.sources.items() if source in group}
        if embeddings:
            actions |= dict.fromkeys(self.embeddings, add_ids)
        self._forward(batch, actions)

    def _forward(
        self, batch: Batch, actions: Mapping[str, Callable[[str, torch.Tensor], None]]
    ) -> None:
        """Runs the model; each named layer's action is called with its name and input."""
        modules = {**self.linear, **self.embeddings}
        layers = {name: modules[name] for name in actions}
        args, kwargs = batch.arguments

        def act(name: str, x: torch.Tensor) -> None:
            actions[name](name, x)

        with reading(layers, act), naming(batch.index), torch.no_grad():
            self.model(*args, **kwargs)

    # ---- gradients ------------------------------------------------------------------------------

    def differentiate(self, batch: Batch, loss: Loss | None) -> None:
        """One backward pass that adds up the squares of the gradients at the layers' outputs. The
        graph begins at the first outputs, so that parameters take no part in it."""
        leaves: list[torch.Tensor] = []

        def add(name: str, ids: torch.Tensor | None, gradient: torch.Tensor) -> None:
            gradient, mask = as_tokens(batch, name, gradient)
            if ids is not None:
                ids = ids.reshape(gradient.shape[:-1])
            self.calibration.update_gradient(name, gradient, mask, ids=ids, threads=self.threads)

        def watch(
            name: str,
            _: torch.nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
        ) -> torch.Tensor:
            if not output.requires_grad:
                leaves.append(output.detach().requires_grad_())
                output = leaves[-1]
            output = output.clone()  # a leaf or a view, changed in place, would lose the hook
            ids = _first(args, kwargs) if name in self.embeddings else None
            output.register_hook(partial(add, name, ids))
            return output

        with ExitStack() as stack:
            for name, module in {**self.embeddings, **self.linear}.items():
                hook = partial(watch, name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            with naming(batch.index), torch.enable_grad():
                value = loss(self.model, batch.value) if loss else self._own_loss(batch)
                if value is None:
                    return
                if not isinstance(value, torch.Tensor) or value.numel() != 1:
                    raise ModelError("the loss is not a tensor with one number")
                if not leaves:  # the sequence reached none of the layers
                    return
                if not value.requires_grad:
                    raise ModelError("the loss does not depend on the layers' outputs")
                torch.autograd.grad(value.sum(), leaves, allow_unused=True)

    def _own_loss(self, batch: Batch) -> torch.Tensor | None:
        """The model's own loss, summed over tokens (None if all labels are ignored); without one,
        random projections of its output."""
        args, kwargs = batch.arguments
        output = self.model(*args, **kwargs)
        causal = type(self.model).__name__.endswith(("LMHeadModel", "ForCausalLM"))
        labels, ids = batch.named.get("labels"), batch.named.get("input_ids")
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(own, torch.Tensor):  # a mean
            if not isinstance(labels, torch.Tensor):
                return own.sum()
            count = int(((labels[..., 1:] if causal else labels) != -100).sum())
            return own.sum() * count if count else None
        logits = getattr(output, "logits", None)
        if causal and isinstance(logits, torch.Tensor) and isinstance(ids, torch.Tensor):
            losses = torch.nn.functional.cross_entropy(
                logits[0, :-1].float(), ids[0, 1:], reduction="none"
            )
            mask = batch.main.mask if batch.main else None
            return (losses if mask is None else losses[mask[0, 1:] & mask[0, :-1]]).sum()
        name = "decoder.output" if batch.decoder else "output"
        hidden, mask = as_tokens(batch, name, _main_output(output))
        hidden = (hidden if mask is None else hidden[mask]).float()
        signs = torch.randint(0, 2, hidden.shape, generator=self.generator).to(hidden.device)
        norms = hidden.detach().norm(dim=-1, keepdim=True).clamp_min(torch.finfo().tiny)
        return ((2 * signs - 1) * hidden / norms).sum()


def _main_output(output: Any) -> torch.Tensor:
    for name in ("last_hidden_state", "logits"):
        if isinstance(value := getattr(output, name, None), torch.Tensor):
            return value
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or not output.is_floating_point() or not output.ndim:
        raise ModelError(
            f"the model's output ({type(output).__name__}) holds no hidden states to take "
            "gradients of: pass loss=, or gradients=0"
        )
    return output


def as_tokens(batch: Batch, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's rows by sequence and token where they are the batch's, and their mask."""
    stream = batch.tokens(name, x.shape[:-1])
    return x.reshape(*stream.shape, x.shape[-1]), stream.mask


@contextmanager
def reading(
    layers: Mapping[str, torch.nn.Module], action: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While it is open, ``action`` is called with the name and the input of each layer that
    runs."""
    with ExitStack() as stack:
        for name, module in layers.items():
            hook = partial(_call_with_input, partial(action, name))
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _call_with_input(
    action: Callable[[torch.Tensor], None],
    _: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """A forward pre-hook."""
    action(_first(args, kwargs))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _width(module: torch.nn.Module) -> int:
    """Numbers of a linear layer's input."""
    assert isinstance(module.weight, torch.Tensor)
    return int(module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1])
