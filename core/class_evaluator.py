"""A classifier's figures while it trains, as Sentence Transformers' trainers ask for them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers.base.evaluation import BaseEvaluator

from .class_metrics import PRIMARY, ClassResult

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped]


class ClassificationEvaluator(BaseEvaluator):
    """Accuracy, macro F1 and AUROC (for several labels or numbers: their own figures) on held-out texts.

    As `evaluator=` of a trainer its figures are logged as `eval_NAME_macro_f1` and so on; give one of them as
    `metric_for_best_model`. `primary_metric` is `NAME_macro_f1`, for a regression `NAME_spearman`.

    Args:
        dataset: One or two text columns and a label.
        name: Put before the figures' names.
        batch_size: Texts in a forward.
        resamples: Bootstrap samples for intervals, kept in `result`; 0 for none.
        write_csv: Whether figures are added to a CSV file where the trainer keeps its evaluations.

    After a call `result` holds everything that was measured.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        name: str = "",
        batch_size: int = 32,
        resamples: int = 0,
        write_csv: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dataset, self.name, self.batch_size = dataset, name, batch_size
        self.resamples, self.write_csv = resamples, write_csv
        self.result: ClassResult | None = None

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Measure `model`, a `burnish.Classifier`; the figures by name."""
        where = f"dataset of the evaluator {self.name}".rstrip()
        self.result = model.measure(
            self.dataset, batch_size=self.batch_size, resamples=self.resamples, where=where
        )  # fmt: skip
        figures = {name: metric.mean for name, metric in self.result.metrics.items()}
        self.primary_metric = PRIMARY[self.result.problem]
        if output_path is not None and self.write_csv:
            self._write(Path(output_path), [epoch, steps, *figures.values()], ["epoch", "steps", *figures])
        found = self.prefix_name_to_metrics(figures, self.name)
        self.store_metrics_in_model_card_data(model, found, epoch, steps)
        return found

    def _write(self, folder: Path, row: list[Any], header: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"classification_evaluation{'_' + self.name if self.name else ''}_results.csv"
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if fresh:
                writer.writerow(header)
            writer.writerow(row)
