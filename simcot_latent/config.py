"""Typed run configuration behind `configs/*.yaml`. Every rule about a value is checked here, once.

`parse` turns what hydra composed into a `RunConfig`; anything wrong ends in a `UserError` that names the key and says
what would be right. A part of a method declares the settings that only it has in a `Config` of its own; they are keys
of `latent`, `decoder` or `loss` by the same name, so adding a part edits nothing here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from simcot_latent.errors import UserError, did_you_mean, either, require, require_choice, some
from simcot_latent.parts import NONE, PARTS, find, named

if TYPE_CHECKING:  # hydra and omegaconf are imported where a command line is read: the rest does without them
    from omegaconf import DictConfig

T = TypeVar("T")

_LORA_TARGETS = ("qkv", "out", "up", "down")  # those of `model.lora`, which stands above this module
_COMPUTED_IN = ("auto", "float32", "bfloat16")
_SPLITS = ("train", "validation", "test")  # those of `data.sources`, which stands above this module
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "rationale": ("natural", "equations", "none"),
        "on_too_long": ("error", "drop"),
        "optimizer": ("adamw", "muon"),
        "lr_schedule": ("linear", "cosine", "constant"),
        "dtype": _COMPUTED_IN,
        "later_attention": ("products", "sdpa"),
        "on_nonfinite": ("error", "skip"),
        "latent.surplus": ("merge", "drop", "write"),
        "latent.missing": ("mask", "answer"),
        "decoder.init": ("random", "base"),
        "loss.step_reduction": ("token", "coconut", "codi"),
    },
    "eval": {"split": _SPLITS, "dtype": _COMPUTED_IN},
    "probe": {"split": _SPLITS, "format": ("table", "json"), "dtype": _COMPUTED_IN},
    "export": {"format": ("hf",), "dtype": ("float32", "bfloat16", "float16")},
    "import": {"kind": ("coconut", "simcot_coconut", "codi", "simcot_codi")},
}
"""The keys of each command whose value is one of a few words; a shell completes them, too."""


def require_choices(config: object, command: str, section: str = "") -> None:
    """`require_choice` for all fields of a config dataclass that are in `CHOICES`.

    Args:
        section: what its keys stand under, such as `latent`.
    """
    for key, choices in CHOICES[command].items():
        within, _, name = key.rpartition(".")
        if within == section:
            require_choice(key, getattr(config, name), choices)


def require_tolerance(key: str, value: float | None) -> None:
    """Refuses what is no tolerance of answers, see `same_number`; None is one: that which the data state."""
    require(value is None or 0 <= value < 1, key, value, "a share of the gold answer, from 0 to below 1")


def config_dir() -> Path:
    """The yaml files: inside an installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


@dataclass
class LatentConfig:
    """How thoughts stand for steps.

    Attributes:
        n_latents: K, the thoughts per question, all of which the model reads.
        latents_per_step: c, the thoughts per step group; a question has K / c groups.
        surplus: what becomes of steps beyond the last group: `merge` (into the last group), `drop`, or `write` (they
            stay written after the thoughts, as in LOTUS).
        missing: the decoder's target for a group without a step: `mask` (none) or `answer` (the answer string).
        drop_last_step: leave the last step of every solution out, in which the answer is worked out: it is neither
            written nor supervised, as by default in the public code of CODI and PCCoT.
        warmup: share of training on written steps, before any thought.
        stages: after the warm-up, the share of training in which thoughts replace one step more at a time (1, 2, .. all
            but one, equally long), or a list of stages, such as `[{steps: 1, share: 0.1}, {steps: 2, share: 0.1}]`
            (`steps`: how many steps thoughts replace, `share`: of training, or `epochs` in its place). In the rest of
            training thoughts replace all steps. As in Coconut, https://arxiv.org/abs/2412.06769, section 3.
        reset_optimizer: forget the optimizer's moments when a stage begins (Coconut does).
        feeds_last: whether the model reads the last state that its thoughts come to (Coconut), or only the decoder does
            (SIM-CoT on CODI): the decoder then has one step more to decode than there are thoughts.
        projector_width: hidden width of the projector between a hidden state and the thought that it becomes (CODI);
            None: no projector, the hidden state is the thought (Coconut).
    """

    n_latents: int = 5
    latents_per_step: int = 1
    surplus: str = "merge"
    missing: str = "answer"
    drop_last_step: bool = False
    warmup: float = 0.15
    stages: Any = 0.2
    reset_optimizer: bool = False
    feeds_last: bool = True
    projector_width: int | None = None

    def __post_init__(self) -> None:
        require(self.n_latents >= 1, "latent.n_latents", self.n_latents, "at least 1")
        require(self.latents_per_step >= 1, "latent.latents_per_step", self.latents_per_step, "at least 1")
        multiple = "a multiple of" if self.feeds_last else "one less than a multiple of"
        right = f"{multiple} latent.latents_per_step={self.latents_per_step}"
        require(self.n_states % self.latents_per_step == 0, "latent.n_latents", self.n_latents, right)
        require_choices(self, "train", "latent")
        right = "mask with latent.drop_last_step=true"
        require(self.missing == "mask" or not self.drop_last_step, "latent.missing", self.missing, right)
        require(0 <= self.warmup < 1, "latent.warmup", self.warmup, "a share of training, from 0 to below 1")

    @property
    def groups(self) -> int:
        """Step groups of a problem."""
        return self.n_states // self.latents_per_step

    @property
    def n_states(self) -> int:
        """What the loop comes to, and the decoder reads, of a problem; see `ThoughtLoop.states`."""
        return self.n_latents + (not self.feeds_last)


@dataclass
class DecoderConfig:
    """The auxiliary decoder, which turns the thoughts of a group into its step.

    Attributes:
        n_layer: its blocks, each of the base model's shape; None: as many as the base has, as in the published code.
        init: how it starts: `random`, or `base`, a copy of the base's first blocks (at most as many as it has), made at
            the start and once more when thoughts begin.
    """

    n_layer: int | None = 1
    init: str = "random"

    def __post_init__(self) -> None:
        right = "at least 1, or null for as many as the base has"
        require(self.n_layer is None or self.n_layer >= 1, "decoder.n_layer", self.n_layer, right)
        require_choices(self, "train", "decoder")


@dataclass
class LossConfig:
    """loss = answer_weight * L_ans + step_weight * L_step.

    Attributes:
        answer_weight: weight of L_ans, the loss on what follows the thoughts.
        step_weight: weight of L_step, the auxiliary decoder's loss; 0: no step supervision, as in Coconut, and no
            decoder is made.
        step_reduction: how L_step averages: `token` (over all step tokens of the optimizer step), `coconut` (a sum over
            a step's tokens, mean over problems, mean over groups) or `codi` (token mean in each group, mean over
            groups), as in the two flavours of the published code.
    """

    answer_weight: float = 1.0
    step_weight: float = 2.0
    step_reduction: str = "token"

    def __post_init__(self) -> None:
        require(self.answer_weight >= 0, "loss.answer_weight", self.answer_weight, "at least 0")
        require(self.step_weight >= 0, "loss.step_weight", self.step_weight, "at least 0")
        require_choices(self, "train", "loss")


@dataclass
class LoRAConfig:
    """What of a model is trained: all of it, or a change of low rank beside frozen layers (LoRA,
    https://arxiv.org/abs/2106.09685), and besides it only what methods have of their own, such as a projector or the
    auxiliary decoder.

    Attributes:
        rank: of the change to each layer; None: all of the model is trained.
        alpha: the change counts alpha / rank.
        dropout: share of a layer's inputs that the change does not see in training. Masks are drawn anew in each step,
            by `seed`, the step and the rank; so without dropout alone two ranks train what one does.
        targets: the linear layers of all blocks that are changed: `qkv` and `out` of attention, `up` and `down` of the
            feed-forward part. All else of the model is frozen: norms, biases, embeddings, output head.
        split: whether queries, keys, values, gate and up have a change of `rank` each, as published where they are
            layers of their own (Llama); false: one for the whole of a fused layer (GPT-2).
        new_rows: whether the rows of embedding table and output head are trained that are of `<|bot|>`, `<|eot|>` and
            the tokens after them, which published vocabularies lack. They start alike (see `new_token_init`), so
            frozen `<|bot|>` and `<|eot|>` would remain one and the same to the model. The public code of CODI freezes
            them nevertheless: `lora=codi`.
        merge: whether checkpoints keep the model with its change (`model.safetensors` is then whole by itself), or the
            model as it was and `lora.safetensors` beside it, from which a loaded model is merged.
    """

    rank: int | None = None
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: list(_LORA_TARGETS))
    split: bool = False
    new_rows: bool = True
    merge: bool = True

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank >= 1, "lora.rank", self.rank, "at least 1, or null for no LoRA")
        require(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "above 0, finite")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a share, from 0 to below 1")
        right = f"some of {', '.join(_LORA_TARGETS)}, each once"
        known = 1 <= len(self.targets) == len({*self.targets} & {*_LORA_TARGETS})
        require(known, "lora.targets", f"[{', '.join(self.targets)}]", right)


@dataclass
class MethodConfig:
    """A method: a choice of parts, and their settings. See `parts.PARTS` for what there is.

    Attributes:
        curriculum: what the stages of training look like: `none` (one stage), `replace` (thoughts replace the written
            steps one after the other, as in Coconut), `fixed_k` (all thoughts from the start, while written steps are
            removed) or `remove_tokens` (no thoughts; the tokens of the written solution are removed, as in iCoT).
        loop: how thoughts come about: `sequential` (hidden states fed back one by one), `jacobi` (all updated at once,
            a few times, PCCoT), `looped` (a block that is read again and again, LOTUS), `compressed` (several tokens of
            the steps in one, CoLaR), `soft` (mixtures of token embeddings), `pause` or `pause_multipass` (a learned
            vector in place of each, the controls), or `none` (no thoughts).
        steps: who must say the steps that thoughts stand for: `decoder` (an auxiliary decoder, SIM-CoT), `own_head`
            (the model's own output head, LOTUS), `compressed` (what loop=compressed predicts, CoLaR) or `none`.
        distill: what the model is pulled towards, beside a pass over the written solution: a list of `hidden` (hidden
            states where the answer begins, CODI) and `kv` (keys and values at the thoughts, KaVa); on a command line
            `none`, `hidden`, `kv` or `hidden_kv`.
        written: whether the written solution is learned in a pass of its own: `joint` (CODI) or `none`.
        terms: further terms of the loss, by the names under which they are registered.
        latent, decoder, loss: settings of the parts.
        own: values of keys of these three sections that only a chosen part declares.
    """

    curriculum: str = NONE
    loop: str = NONE
    steps: str = NONE
    distill: list[str] = field(default_factory=list)
    written: str = NONE
    terms: list[str] = field(default_factory=list)
    latent: LatentConfig = field(default_factory=LatentConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    own: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def simcot(
        cls,
        latent: LatentConfig | None = None,
        decoder: DecoderConfig | None = None,
        loss: LossConfig | None = None,
        **parts: Any,
    ) -> MethodConfig:
        """The parts of mode=latent, some of which may be others; None: the default settings."""
        chosen: dict[str, Any] = {"curriculum": "replace", "loop": "sequential", "steps": "decoder"} | parts
        return cls(
            latent=latent or LatentConfig(), decoder=decoder or DecoderConfig(), loss=loss or LossConfig(), **chosen
        )

    @property
    def parts(self) -> list[tuple[str, str]]:
        """The chosen parts by group and key, without `none`."""
        chosen = [("curriculum", self.curriculum), ("loop", self.loop), ("steps", self.steps)]
        chosen += [("written", self.written), *(("distill", key) for key in self.distill)]
        chosen += [("term", key) for key in self.terms]
        return [(group, key) for group, key in chosen if key != NONE]

    def settings(self, cls: type[T]) -> T:
        """An instance of a part's `Config`: each field has the value of the key of its name."""
        values: dict[str, Any] = dict(self.own)
        for section in (self.latent, self.decoder, self.loss):
            values |= {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})  # type: ignore[arg-type]


@dataclass(frozen=True)
class NoSettings:
    """The settings of a part that has none of its own."""


SECTIONS: dict[str, type] = {"latent": LatentConfig, "decoder": DecoderConfig, "loss": LossConfig}
"""The sections of a method's settings."""


@dataclass
class RunConfig:
    """Everything about a training run that all methods share.

    Attributes:
        mode: how to train: `latent`, `weighted`, or the name of another file in `configs/mode/`.
        model: the shape of a model that starts from random weights: `tiny`, `small` or `gpt2`.
        data: where problems come from: `arithmetic`, `gsm8k` or `gsm8k_aug`.
        tokenizer: `default` (2,048 tokens, shipped) or `gpt2`.
        lora: what of the model is trained: all (`none`), or a change of low rank (`codi`); see `LoRAConfig`.
        rationale: what `mode=weighted` writes: `natural` (whole solutions), `equations` (steps only) or `none` (the
            answer only). Where single steps are written behind thoughts, as in `mode=latent`, it is `equations`.
        on_too_long: what to do with problems that do not fit the context: `error`, or `drop` (they are counted and
            reported).
        step_weight_multiplier: loss weight of the tokens of written steps; 1 is plain fine-tuning. In `mode=latent` it
            applies to the warm-up and to steps that thoughts have not replaced yet.
        track_step_accuracy: log `step_accuracy`.
        num_epochs: passes over the training problems, where `num_iterations` is -1.
        num_iterations: optimizer steps; -1: as many as `num_epochs` takes.
        device_batch_size: problems per forward pass and rank; the rest of an optimizer step is accumulated.
        target_examples_per_step: problems per optimizer step, over all ranks.
        optimizer: `muon` (Muon, https://kellerjordan.github.io/posts/muon/, for matrices; AdamW for embeddings, output
            head, norms and biases) or `adamw` (for everything).
        learning_rate: AdamW's, at its peak.
        matrix_lr: Muon's, at its peak.
        betas: AdamW's.
        weight_decay: decoupled weight decay; not applied to norms and biases.
        warmup_ratio: share of training in which the learning rate rises; not to be confused with `latent.warmup`.
        lr_schedule: shape of the learning rate after that: `linear`, `cosine` or `constant`.
        final_lr_ratio: what the learning rate ends at, as a share of its peak.
        max_grad_norm: gradients are clipped to this norm; None: no clipping.
        seed: of the weights and of the order of problems; `data=arithmetic` has a seed of its own.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` is the GPU if there is one.
        dtype: number format of matrix products: `float32`, `bfloat16`, or `auto`, which is bfloat16 where the hardware
            has it, but float32 for narrow models on a CPU. Weights stay float32.
        compile: apply `torch.compile` to the parts of a block before and after attention, in passes over many tokens.
        compile_thoughts: apply `torch.compile(mode="reduce-overhead")` to passes over few tokens too; meant for GPUs.
        later_attention: how passes after the first compute attention: `products`, or `sdpa`, PyTorch's fused kernel;
            meant for GPUs.
        activation_checkpointing: compute activations a second time in the backward pass: less memory, more time.
        profile: profile three steps; the trace and a table go to `out_dir/profile`.
        out_dir: the run's folder; None: `runs/<mode>`, or `runs/<mode>-2`, ... where that exists.
        init_from: a model to start from, which brings its shape and tokenizer: a Hugging Face folder or hub id, a GGUF
            file, a nanochat folder, or a checkpoint.
        new_token_init: how rows of tokens start that `init_from` lacks: `mean` (the mean of its rows), or as the row of
            a token, such as `"<<"`.
        resume: go on with the run in `out_dir`: `true`, `false`, or `auto` (if there is one, else start).
        resume_with_changes: let `resume=auto` go on although other options have changed.
        max_minutes: save and end after so many minutes of wall-clock time; None: no limit.
        on_nonfinite: what to do when a loss or gradient is not finite: `error`, or `skip` (that step's update is left
            out).
        max_nonfinite: how many steps in a row may be skipped; one more is an error.
        verify: compare the files of checkpoints that are read (`resume`, `init_from`) with their manifest.
        log_every: optimizer steps between two logged steps.
        eval_every: optimizer steps between two evaluations on the validation split; -1: only at the end.
        eval_examples: validation problems, for losses and answers.
        eval_batch_size: problems per batch of an evaluation.
        checkpoint_every: optimizer steps between two checkpoints; -1: only at the end.
        keep_checkpoints: how many checkpoints are kept, the newest ones; older ones are deleted.
        max_new_tokens: most tokens of an answer, thoughts not counted.
        run: name of the wandb run; empty: wandb is not started.
        wandb_project: the wandb project.
    """

    mode: str
    model: dict[str, Any]
    data: dict[str, Any]
    tokenizer: dict[str, Any]
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    rationale: str = "natural"
    on_too_long: str = "error"
    step_weight_multiplier: float = 2.0
    track_step_accuracy: bool = True
    num_epochs: int = 1
    num_iterations: int = -1
    device_batch_size: int = 32
    target_examples_per_step: int = 32
    optimizer: str = "muon"
    learning_rate: float = 2e-3
    matrix_lr: float = 0.013
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1
    warmup_ratio: float = 0.05
    lr_schedule: str = "linear"
    final_lr_ratio: float = 0.0
    max_grad_norm: float | None = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    compile_thoughts: bool = False
    later_attention: str = "products"
    activation_checkpointing: bool = False
    profile: bool = False
    out_dir: str | None = None
    init_from: str | None = None
    new_token_init: str | None = "mean"  # null is refused below, in words of its own
    resume: Any = False
    resume_with_changes: bool = False
    max_minutes: float | None = None
    on_nonfinite: str = "error"
    max_nonfinite: int = 10
    verify: bool = True
    log_every: int = 20
    eval_every: int = 500
    eval_examples: int = 500
    eval_batch_size: int = 128
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    max_new_tokens: int = 256
    run: str = ""
    wandb_project: str = "simcot_latent"

    def __post_init__(self) -> None:
        require_choices(self, "train")
        require(0 <= self.step_weight_multiplier < math.inf, "step_weight_multiplier", self.step_weight_multiplier,
                "at least 0, finite")  # fmt: skip
        require(self.num_iterations >= 1 or self.num_iterations == -1, "num_iterations", self.num_iterations,
                "at least 1, or -1 to train for num_epochs")  # fmt: skip
        for key in ("num_epochs", "device_batch_size", "target_examples_per_step", "log_every", "eval_examples",
                    "eval_batch_size", "keep_checkpoints", "max_new_tokens", "max_nonfinite"):  # fmt: skip
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("eval_every", "checkpoint_every"):
            require(getattr(self, key) >= 1 or getattr(self, key) == -1, key, getattr(self, key),
                    "at least 1, or -1 for only at the end")  # fmt: skip
        for key in ("learning_rate", "matrix_lr"):
            require(0 < getattr(self, key) < math.inf, key, getattr(self, key), "above 0, finite")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)"
        )
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "a share of training, from 0 to 1")
        require(0 <= self.final_lr_ratio <= 1, "final_lr_ratio", self.final_lr_ratio, "from 0 to 1")
        require(
            self.max_grad_norm is None or 0 < self.max_grad_norm < math.inf,
            "max_grad_norm",
            self.max_grad_norm,
            "above 0, or null for no clipping",
        )
        require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        require(
            self.resume is True or self.resume is False or self.resume == "auto",
            "resume",
            self.resume,
            "true, false, or auto (go on if there is something to go on with)",
        )
        require(
            self.out_dir is None or self.out_dir.strip() != "",
            "out_dir",
            self.out_dir,
            f"a folder, or null for runs/{self.mode}, runs/{self.mode}-2, ...",
        )
        require(
            self.resume is False or self.out_dir is not None,
            "resume",
            str(self.resume).lower(),
            "given with out_dir=, the run to go on with",
        )
        require(
            self.max_minutes is None or 0 < self.max_minutes < math.inf,
            "max_minutes",
            self.max_minutes,
            "above 0, or null for no limit",
        )
        require(self.new_token_init is not None, "new_token_init", "null", "mean, or a token")


def parse(raw: DictConfig) -> tuple[RunConfig, MethodConfig]:
    """The run's configuration and its method's.

    Raises:
        UserError: a key is unknown, or a value is of the wrong type or impossible, or a part is not registered.
    """
    sections = dict(raw)
    if "objective" in sections:
        raise UserError(f"objective: {REMOVED['objective']}")
    if "projector_width" in (sections.get("model") or {}):
        raise UserError("model.projector_width: is latent.projector_width now")
    shared_keys = {f.name for f in dataclasses.fields(RunConfig)}
    shared = {key: value for key, value in sections.items() if key in shared_keys}
    run = typed(RunConfig, {key: literal(value) if isinstance(value, str) else value for key, value in shared.items()})
    chosen = {key: sections.get(key, NONE) for key in ("curriculum", "loop", "steps", "written")}
    for key, value in chosen.items():
        require(isinstance(value, str), key, value, "the name of a part")
    several = typed(_Several, {key: sections[key] for key in ("distill", "terms") if key in sections})
    method = MethodConfig(**chosen, distill=several.distill, terms=several.terms)
    parts = [find(group, key) for group, key in method.parts]
    if not parts and (given := [key for key in SECTIONS if key in sections]) and run.mode != "weighted":
        raise UserError(f"loop=none: has no thoughts, so {some(given)} of mode={run.mode} can set nothing; take a loop")
    known = {*shared_keys, *chosen, "distill", "terms", *(SECTIONS if parts else ())}
    if unknown := [key for key in sections if key not in known]:
        raise UserError(f"{unknown[0]}: mode={run.mode} has no such key{did_you_mean(str(unknown[0]), known)}")
    for name, cls in SECTIONS.items():
        values = sections.get(name, {})
        if isinstance(values, Mapping):
            own = own_settings(values, cls, parts, name)
            method.own |= own
            values = {key: value for key, value in values.items() if key not in own}
        setattr(method, name, typed(cls, values, name))
    check_parts(method, run)
    for part in parts:
        if hasattr(part, "Config"):
            method.settings(part.Config)  # which refuses impossible values now, not after the data are loaded
    return run, method


def check_parts(method: MethodConfig, run: RunConfig) -> None:
    """Refuses parts that make no method together, in one line that says which needs what.

    Every rule about parts is here, but for those that a curriculum has about its own stages.

    Raises:
        UserError: they do not.
    """
    chosen = [(group, key, find(group, key)) for group, key in method.parts]
    if method.loop == NONE:
        for group, key, _ in chosen:
            if group not in ("curriculum", "loop"):
                instead = "leave it out" if group == "term" else f"{group}=none"
                raise UserError(
                    f"{named(group, key)}: needs thoughts, which loop=none has not; take a loop, or {instead}"
                )
    else:
        check_loop(method, run, [(named(group, key), part) for group, key, part in chosen if group != "curriculum"])
    curriculum = find("curriculum", method.curriculum)(method, run)  # which refuses stages that cannot be
    if method.loop != NONE and run.rationale != "equations" and curriculum.writes_single_steps:
        writes = "latent.surplus=write" if method.latent.surplus == "write" else f"curriculum={method.curriculum}"
        raise UserError(
            f"rationale={run.rationale}: must be equations with {writes}, which writes single steps behind the thoughts"
        )


def check_loop(method: MethodConfig, run: RunConfig, parts: list[tuple[str, Any]]) -> None:
    """Refuses parts and settings that a loop cannot do with; see `check_parts`.

    Args:
        parts: the chosen ones but the curriculum, as a message names them, and their classes.
    """
    key, loop, latent = f"loop={method.loop}", find("loop", method.loop), method.latent
    for part, cls in parts:
        for what, words in (("hidden", "hidden states"), ("keys", "keys"), ("predictions", "predictions")):
            if getattr(cls, f"needs_{what}", False) and not getattr(loop, f"gives_{what}"):
                others = [other for other in PARTS["loop"] if getattr(find("loop", other), f"gives_{what}")]
                raise UserError(f"{part}: needs the {words} of thoughts, which {key} lacks; take loop={either(others)}")
    if loop.gives_predictions:
        if not any(getattr(cls, "needs_predictions", False) for _, cls in parts):
            raise UserError(f"{key}: needs a term that trains what it predicts; take steps=compressed")
        if method.steps != NONE and method.loss.step_weight == 0:
            raise UserError(f"loss.step_weight=0.0: must be above 0 with {key}, which learns from steps=")
        if run.rationale == "none":
            raise UserError(f"rationale=none: {key} makes its thoughts of the written solution; take equations")
    if latent.drop_last_step and run.rationale == "natural":
        raise UserError("rationale=natural: must be equations with latent.drop_last_step=true")
    settings = {f.name for f in dataclasses.fields(loop.Config)}
    if latent.projector_width is not None and "projector_width" not in settings:
        raise UserError(f"latent.projector_width={latent.projector_width}: must be null with {key}, which has none")
    if not latent.feeds_last and "feeds_last" not in settings:
        raise UserError(f"latent.feeds_last=false: must be true with {key}, whose thoughts are all read")


REMOVED = {
    "objective": "is no key any more; a method is a choice of parts, curriculum=, loop=, steps= and terms=, see "
    "docs/extending.md"
}
"""Keys of earlier versions that are gone, and what takes their place."""


@dataclass
class _Several:
    """The groups of which a method may have several parts."""

    distill: list[str] = field(default_factory=list)
    terms: list[str] = field(default_factory=list)


def own_settings(values: Mapping[Any, Any], cls: type, parts: list[Any], section: str) -> dict[str, Any]:
    """The values of those keys of a section that its dataclass has not, but a part's `Config`."""
    left = {key: value for key, value in values.items() if key not in {f.name for f in dataclasses.fields(cls)}}
    found: dict[str, Any] = {}
    for config in (part.Config for part in parts if hasattr(part, "Config")):
        names = {f.name for f in dataclasses.fields(config)}
        if own := [name for name in left if name in names]:
            # With the shared settings that it takes, too: it may compare them with its own.
            settings = typed(config, {key: value for key, value in values.items() if key in names}, section)
            found |= {key: getattr(settings, key) for key in own}
    return found


def typed(cls: type[T], values: Any, section: str = "") -> T:
    """An instance of a config dataclass, its values converted to the declared types.

    Raises:
        UserError: a key is unknown, a value is of another type, or `cls` refuses it.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    prefix = f"{section}." if section else ""
    if values is None:
        raise UserError(f"{section}=null: must be a section of keys; leave it out for its defaults")
    for key, kind in get_type_hints(cls).items():
        if kind is not Any and type(None) not in get_args(kind) and values.get(key, "") is None:
            words = _IN_WORDS.get(get_origin(kind) or kind, "a value")
            raise UserError(f"{prefix}{key}=null: must be {words}; leave it out for its default")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).split("\n")[0]
        if isinstance(error, ConfigKeyError):
            known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
            reason = f"no such key{did_you_mean(str(error.key), known)}"
        raise UserError(f"{prefix}{error.full_key or error.key}: {reason}") from error


_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a section of keys",
}


def one_line(text: str) -> str:
    """A text with its line breaks and runs of blanks made single blanks."""
    return " ".join(text.split())


def literal(value: Any) -> Any:
    """Plain values as OmegaConf must be given them so that no text in them is an interpolation: `${` as `\\${`."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def as_plain(raw: Any) -> dict[str, Any]:
    """A composed configuration as plain values, for `config.json`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(raw, resolve=True)  # type: ignore[return-value]


def instantiate(section: Any, key: str, values: Mapping[str, Any] | None = None) -> Any:
    """What a config section with a `_target_` stands for.

    Args:
        section: from the command line and yaml files, never from a checkpoint: it may import and call anything.
        key: the section's, for errors.
        values: further arguments, as they stand: nothing in them is imported, called or resolved.

    Raises:
        UserError: the target refuses a value, or does not know a key.
    """
    import hydra
    from hydra.errors import InstantiationException
    from omegaconf import DictConfig

    if isinstance(section, DictConfig):
        section = as_plain(section)
    try:
        section = literal(literal(section))  # hydra resolves once, and once more in reading
        if not values:
            return hydra.utils.instantiate(section)
        make = hydra.utils.instantiate(section, _partial_=True)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        if match := re.search(r"unexpected keyword argument '(.+?)'", str(error.__cause__)):
            known = [str(name) for name in section if name not in ("_target_", match[1])]
            raise UserError(f"{key}.{match[1]}: no such key{did_you_mean(match[1], known)}") from error
        raise UserError(f"{key}: {error.__cause__ or error}") from error
    try:
        return make(**values)
    except TypeError as error:  # a key that it does not know
        raise UserError(f"{key}: {error}") from error
