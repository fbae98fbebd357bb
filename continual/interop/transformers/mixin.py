"""What a trainer does otherwise while parts train with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from continual.interop.transformers.rows import Numbered, NumberedCollator

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object


class Rider(TrainerCallback):
    """A callback that takes hold of its trainer: :class:`~continual.interop.transformers.hooks.Hooks`."""

    def attach(self, trainer: Any) -> None:
        """Take hold of ``trainer``."""
        raise NotImplementedError


class ContinualMixin(_Base):
    """For ``class MyTrainer(ContinualMixin, SFTTrainer)``, with ``callbacks=[Continual(...)]``.

    Any other trainer takes it on when it is given a :class:`~continual.interop.transformers.Continual`, so that nobody needs to
    write the class. Without one it changes nothing.
    """

    continual: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for callback in list(self.callback_handler.callbacks):
            if isinstance(callback, Rider):
                callback.attach(self)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; goes on with the memory of the checkpoint that it resumes from."""
        memory = self.continual
        if memory is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        memory.attach(self)  # it may have gone on to another trainer since
        folder = resume_from_checkpoint or None
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))  # type: ignore[no-untyped-call]
        memory.prepare(None if folder is None else Path(folder))
        scaled, self.loss_is_scaled_for_ga = getattr(self, "loss_is_scaled_for_ga", None), True
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            memory.training, self.loss_is_scaled_for_ga = False, scaled

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the trainer's, after parts have begun: they may add and freeze parameters."""
        if self.continual is not None and self.continual.training:
            self.continual.begin()
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        return optimizer

    def get_train_dataloader(self) -> Any:
        """As the trainer's, its batches with a column ``row``: the id of each row."""
        if self.continual is None or not self.continual.training:
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        table = self.continual.table(dataset, 0)
        self.train_dataset, self.data_collator = Numbered(table.dataset, table.rows_N), NumberedCollator(table.collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(dataset.dataset if isinstance(dataset, Numbered) else dataset)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; counts the rows of the step, since here every row weighs the same, not every token."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.continual is None or not self.continual.training:
            return batches, items
        self.continual.step_rows = sum(len(batch["labels"]) for batch in batches if "labels" in batch)
        return batches, None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """In training, the strategy's loss; in evaluation, the trainer's."""
        memory = self.continual
        if memory is None or not memory.training or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        share = len(inputs["labels"]) / memory.step_rows if "labels" in inputs else 1.0
        if not hasattr(type(self), "loss_is_scaled_for_ga"):  # before transformers 5.23, which divides by this
            share *= self.current_gradient_accumulation_steps
        loss = memory.session.loss(inputs)
        return loss if share == 1 else loss * share

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's; after the backward pass that completes a step, parts may change the gradients."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.continual is not None and self.continual.training:
            self.continual.after_backward(loss)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's; where the strategy trains an adapter, a plain LoRA folder that stock PEFT loads on the base."""
        memory = self.continual
        if memory is None or not memory.adapts:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        os.makedirs(folder, exist_ok=True)
        memory.write_adapter(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing where the strategy trains an adapter: the state that was read before holds it."""
        if self.continual is None or not self.continual.adapts:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
