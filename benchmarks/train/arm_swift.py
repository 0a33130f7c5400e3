"""ms-swift's Seq2SeqTrainer on padded batches of this project's model, registered as its documentation has it.

Its own SAIL-VL2 (``sail_vl2``) cannot be used for equal work: it wants transformers <= 4.51.3 and the code inside the
released checkpoints. Here the model is registered with its loader for transformers' classes, and a template whose
collator gives the batches of ``arm_trainer``; its packing needs flash attention, so it pads.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import arm_trainer
import torch
import transformers
import work as shared
from datasets import Dataset
from swift.model import ModelMeta, get_model_processor, register_model
from swift.template import Template, TemplateMeta, get_template, register_template
from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

NAME = "sailvl_equal_work"


class Given(Template):
    """Its data are rows of the work; decoding and padding are the ``collate`` that it is handed."""

    collate: Any = None

    def data_collator(self, batch: list[dict[str, Any]], *, padding_to: int | None = None) -> dict[str, Any]:
        return self.collate(batch)


register_model(ModelMeta(NAME, [], template=NAME, architectures=["SailVLForConditionalGeneration"], is_multimodal=True))
register_template(TemplateMeta(NAME, prefix=[], prompt=["{{QUERY}}"], chat_sep=None, template_cls=Given))


def train(work: shared.Work, args: argparse.Namespace, updates: int, precision: str) -> shared.Run:
    run, samples = shared.Run(), shared.Samples(work)
    rows, passes = arm_trainer.batches(work, samples, args.micro, sort=False)
    model, processor = get_model_processor(
        f"{work.folder}/model", model_type=NAME, torch_dtype=torch.float32, device_map="cpu", attn_impl="sdpa",
        auto_model_cls=transformers.AutoModel, download_model=False,
    )  # fmt: skip
    model.train()
    template = get_template(processor)
    template.collate = arm_trainer.collator(samples, run)
    template.set_mode("train")
    with tempfile.TemporaryDirectory() as out:
        options = arm_trainer.options(out, passes, updates, precision)
        options |= {"check_model": False, "dataloader_num_workers": 0, "train_dataloader_shuffle": False}
        trainer = Seq2SeqTrainer(
            model=model, args=Seq2SeqTrainingArguments(**options), template=template,
            train_dataset=Dataset.from_dict({"rows": rows}), optimizers=(work.optimizer(model), None),
        )  # fmt: skip
        trainer.add_callback(arm_trainer.Watch(run))
        trainer.train()
    return run


if __name__ == "__main__":
    shared.run_arm(train, micro={"type": int, "default": 8})
