"""FPP in Hugging Face's Trainer: its checkpoints, how it goes on from them, and its best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fpp_cases import SOON, batch

from foldprune import FoldpruneWarning, Recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from foldprune.torch import FPP, PackedLinear, to_compressed  # noqa: E402


def _trainer(model: Any, fpp: FPP, folder: Path, **options: Any) -> Any:
    rows = [{k: v[0] for k, v in batch(i).items()} for i in range(20)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=2, report_to=[],
        save_strategy="steps", save_steps=1, use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[fpp.callback()]
    )


def test_trainer(model_of, tmp_path):
    def begin() -> tuple[Any, FPP, Any]:
        model = model_of("bert")
        fpp = FPP(model, Recipe(fpp=0.6), schedule=SOON)
        return model, fpp, _trainer(model, fpp, tmp_path)

    model, fpp, trainer = begin()
    trainer.train()
    assert fpp.done and isinstance(model.bert.encoder.layer[0].output.dense, PackedLinear)
    assert to_compressed(model).report.totals["feed_forward"].removed > 0.4
    expected = model.state_dict()
    for step in (4, 8):  # before and after packing
        folder = tmp_path / f"checkpoint-{step}"
        model, fpp, trainer = begin()
        fpp.load_state_dict(torch.load(folder / "fpp.pt"))
        trainer.train(resume_from_checkpoint=str(folder))
        found = model.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (step, name)
    _, fpp, trainer = begin()
    with pytest.warns(FoldpruneWarning, match=r"after step 4.*fpp\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_trainers_best_model_is_pruned(model_of, tmp_path):
    model = model_of("bert")
    fpp = FPP(model, Recipe(fpp=0.6), schedule=SOON)
    trainer = _trainer(
        model,
        fpp,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so the first steps were the best
    )
    trainer.train()
    best = torch.load(Path(trainer.state.best_model_checkpoint) / "fpp.pt")
    assert best["packed"] and best["steps"] >= SOON.end
    assert fpp.rate == pytest.approx(0.6, abs=0.01)
