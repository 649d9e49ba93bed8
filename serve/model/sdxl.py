"""The SDXL model: encode, denoise and decode. `loading.py` loads it.

Each stage method enqueues its work and returns without waiting for the device. Timing, pacing and
errors are the caller's. The denoising loop is diffusers' own pipeline, called with prompt
embeddings. Text is encoded here, because diffusers logs the part of a prompt that it cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from kernels_warmup.rewrites.pixels import all_finite, to_pixels
from kernels_warmup.rewrites.prepared_loop import prepare_loop
from kernels_warmup.rewrites.text_once import BUFFERED_TEXT, BufferedText, TextOnce
from kernels_warmup.rewrites.zero_text import ZERO_TEXT, takes_zero_text
from kernels_warmup.shapes import CompiledShape
from serve.errors import ModelError
from serve.model.initial_image import InitialLatents, LaterStart
from serve.model.noise import cpu_generator
from serve.model.prompt_tokens import PromptRules, count_chunks, tokenise
from serve.model.prompt_weights import weigh
from serve.model.safety_checker import SafetyChecker
from serve.model.scheduler_watch import watch_scheduler
from serve.model.schedulers import OWN_SCHEDULE, Schedule


@dataclass(frozen=True, slots=True)
class PreparedText:
    """What the UNet's steps read of the text, computed before the run's first step."""

    buffered: BufferedText
    """Its place in the buffers, which the next preparation overwrites."""
    shape: CompiledShape
    """The image size it was computed for: the size is part of what the steps read."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """All that the steps of one run need of its prompts: made by `encode_prompts`, read by
    `denoise`.

    Attributes:
        prompt: (images, chunks x 77, width of both encoders).
        pooled: (images, width of the second encoder).
        negative, negative_pooled: the same of the negative prompts; None without guidance.
        truncated: for each image, whether an encoder cut its prompt or its negative prompt.
        tokens: how many tokens each whole prompt has, its start and end included.
        zero_negative: there is guidance and every negative embedding is zeros, as for an empty
            negative prompt. Steps may skip the attention to it.
        prepared: computed ahead where the model does that and the size was known.
        prepared_unguided: the same of the prompts alone, for a run whose guidance ends early.
    """

    prompt: torch.Tensor
    pooled: torch.Tensor
    negative: torch.Tensor | None
    negative_pooled: torch.Tensor | None
    truncated: tuple[bool, ...]
    tokens: tuple[int, ...]
    zero_negative: bool = False
    prepared: PreparedText | None = None
    prepared_unguided: PreparedText | None = None

    def without_guidance(self) -> Conditioning:
        """The same prompts without their negative ones."""
        if self.negative is None:
            return self
        return replace(
            self,
            negative=None,
            negative_pooled=None,
            zero_negative=False,
            prepared=self.prepared_unguided,
            prepared_unguided=None,
        )

    def as_steps_read_it(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The text and the pooled text as the pipeline passes them to every step: the negative half
        first."""
        if self.negative is None or self.negative_pooled is None:
            return self.prompt, self.pooled
        return (
            torch.cat([self.negative, self.prompt]),
            torch.cat([self.negative_pooled, self.pooled]),
        )


@dataclass(frozen=True, slots=True)
class DecodedImages:
    """Images in host memory, valid once the device has finished the copy.

    Attributes:
        pixels: (images, height, width, 3) uint8.
        finite: (images,) bool: whether all of an image's values are finite.
        on_device: the pixels on the model's device.
    """

    pixels: torch.Tensor
    finite: torch.Tensor
    on_device: torch.Tensor


@dataclass(frozen=True, slots=True)
class _UnguidedSteps:
    """What the steps after the end of guidance read.

    Attributes:
        tensors: variables of diffusers' loop, by their names, as its step callback returns them.
        options: the steps' `cross_attention_kwargs`.
    """

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any] | None


class SdxlModel:
    """A loaded SDXL pipeline. Used by one thread at a time."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        name: str,
        device: torch.device,
        trained_shapes: tuple[CompiledShape, ...],
        schedule: Schedule = OWN_SCHEDULE,
    ) -> None:
        schedule.apply(pipeline)
        self.timesteps = schedule.timesteps
        self.name = name
        self.device = device
        self.dtype: torch.dtype = pipeline.unet.dtype
        self.trained_shapes = trained_shapes
        self.pipeline = pipeline
        self.text: TextOnce | None = None
        """Computes once a run what its steps read of the text; None: every step computes it."""
        self.prompt_rules = PromptRules()
        self.safety_checker: SafetyChecker | None = None
        self.commit: str | None = None
        """Of the hub's repository that it was loaded from."""
        self._loop = prepare_loop(pipeline)
        self._later_start = LaterStart(self._loop)
        self._preview_map: torch.Tensor | None = None
        pipeline.set_progress_bar_config(disable=True)

    def chunks_of(self, prompt: str, negative_prompt: str, guided: bool) -> int:
        """How many chunks a run needs to read these prompts; at most as many as the rules allow.

        For any thread. Both prompts get the same number, because the UNet reads both at once.
        """
        texts = self.prompt_rules.read([prompt, negative_prompt] if guided else [prompt])
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        needed = max(count_chunks(tokenizer, texts) for tokenizer in tokenizers)
        return min(needed, self.prompt_rules.most_chunks)

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        guided: bool,
        shape: CompiledShape | None = None,
        chunks: int = 1,
        guidance_ends: bool = False,
    ) -> Conditioning:
        """Encode a run's prompts with both text encoders, and the negative prompts with guidance.

        Args:
            chunks: every text is cut or padded to this number of chunks of 75 tokens.
            shape: the size of the run's images. With it, what the steps read of the text is
                computed here too, if the model computes that once a run.
            guidance_ends: the run's last steps have no guidance. What they read is computed too.
        """
        images = len(prompts)
        zeros_for_empty = self.pipeline.config.force_zeros_for_empty_prompt
        has_texts = [bool(text.strip()) or not zeros_for_empty for text in negative_prompts]
        encode_negative = guided and any(has_texts)
        texts = [*prompts, *negative_prompts] if encode_negative else [*prompts]
        hidden, pooled, truncated, tokens = self._encode_texts(texts, chunks)
        prompt, pooled_prompt = hidden[:images], pooled[:images]
        negative = negative_pooled = None
        if encode_negative:
            negative, negative_pooled = hidden[images:], pooled[images:]
            pairs = zip(truncated[:images], truncated[images:], strict=True)
            truncated = tuple(one or other for one, other in pairs)
            for image, has_text in enumerate(has_texts):
                if not has_text:
                    negative[image].zero_()
                    negative_pooled[image].zero_()
        elif guided:
            negative, negative_pooled = torch.zeros_like(prompt), torch.zeros_like(pooled_prompt)
        conditioning = Conditioning(
            prompt,
            pooled_prompt,
            negative,
            negative_pooled,
            truncated,
            tokens[:images],
            zero_negative=guided and not encode_negative,
        )
        if self.text is None or shape is None:
            return conditioning
        if guided and guidance_ends:
            alone = self._prepare_text(self.text, conditioning.without_guidance(), shape)
            conditioning = replace(conditioning, prepared_unguided=alone)
        return replace(conditioning, prepared=self._prepare_text(self.text, conditioning, shape))

    @torch.no_grad()
    def initial_latents(
        self, pictures: Sequence[Any], copies: Sequence[int], first_step: int
    ) -> InitialLatents:
        """Encode the pictures that a run of image to image begins with.

        Each is encoded by itself, so that its latents do not depend on the others. They are the
        mode of the encoder's distribution, so that they do not depend on a seed. The encoder runs
        eagerly.

        Args:
            pictures: each a numpy array (height, width, 3) uint8, all of one size.
            copies: for each picture, how many images of the run begin with it.
            first_step: the first step that runs; those before it are left out.
        """
        vae = self.pipeline.vae
        latents = []
        for picture, count in zip(pictures, copies, strict=True):
            pixels = (
                _to_device(torch.from_numpy(picture), self.device).permute(2, 0, 1)[None].float()
            )
            encoded = vae.encode((pixels / 127.5 - 1).to(vae.dtype), return_dict=False)[0].mode()
            scaled = (encoded * vae.config.scaling_factor).to(self.dtype)
            latents.append(scaled.expand(count, -1, -1, -1))
        # In the memory order of noise, which the compiled graphs were made for; the encoder's own
        # order may be another.
        return InitialLatents(torch.cat(latents).contiguous(), first_step)

    def denoise(
        self,
        conditioning: Conditioning,
        *,
        shape: CompiledShape,
        num_inference_steps: int,
        guidance_scale: float,
        seeds: Sequence[int],
        on_loop_begins: Callable[[], None],
        on_step_enqueued: Callable[[int, torch.Tensor | None], None],
        watch_latents: bool = False,
        guided_steps: int | None = None,
        initial: InitialLatents | None = None,
    ) -> torch.Tensor:
        """Run the denoising loop; returns latents (images, channels, height / 8, width / 8).

        Args:
            num_inference_steps: as many as `timesteps`, where the model has fixed ones.
            seeds: one for each image. An image's noise does not depend on the others of the run.
            on_loop_begins: called when the loop is about to start.
            on_step_enqueued: called with the index of each step once its work is enqueued, and with
                the step's latents if `watch_latents` is set. An exception from it ends the loop.
            guided_steps: how many steps have guidance, if `guidance_scale` is above 1; the steps
                after them run without it. None: all of them.
            initial: for image to image, what the loop begins with, under the seeds' noise.
        """
        # Noise is drawn on the CPU, so that a seed means the same image on every device.
        generators = [cpu_generator(seed) for seed in seeds]
        size = (1, self.pipeline.unet.config.in_channels, *shape.latent)
        noise = torch.cat([torch.randn(size, generator=each) for each in generators])
        latents = _to_device(noise.to(self.dtype), self.device)
        if self.device.type != "cpu":
            # A stochastic scheduler draws noise in every step. It draws on the device, because a
            # copy from the host would be a wait inside the loop.
            generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

        steps_to_run = num_inference_steps - (0 if initial is None else initial.first_step)
        unguided = None
        if guidance_scale <= 1 or guided_steps == 0:
            guidance_scale, conditioning = 1.0, conditioning.without_guidance()
        elif guided_steps is not None and guided_steps < steps_to_run:
            unguided = self._unguided_steps(conditioning.without_guidance(), shape)

        steps_ended = 0

        def on_step_end(
            pipeline: Any, evaluation: int, _timestep: Any, tensors: dict[str, torch.Tensor]
        ) -> dict[str, torch.Tensor]:
            nonlocal steps_ended
            order = pipeline.scheduler.order
            if not _ends_a_step(evaluation, pipeline.num_timesteps, steps_to_run, order):
                return {}
            # The timestep is a scalar on the device: reading it would stall the loop.
            on_step_enqueued(steps_ended, tensors.get("latents"))
            steps_ended += 1
            if steps_ended != guided_steps or unguided is None:
                return {}
            self._loop.end_guidance(unguided.options)
            return dict(unguided.tensors)

        begin = nullcontext() if initial is None else self._later_start.begin_with(initial, latents)
        with begin, watch_scheduler(self._loop.scheduler, on_loop_begins):
            output = self._loop(
                prompt_embeds=conditioning.prompt,
                pooled_prompt_embeds=conditioning.pooled,
                negative_prompt_embeds=conditioning.negative,
                negative_pooled_prompt_embeds=conditioning.negative_pooled,
                height=shape.height,
                width=shape.width,
                num_inference_steps=num_inference_steps,
                timesteps=self.timesteps,
                guidance_scale=guidance_scale,
                latents=latents,
                generator=generators,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=["latents"] if watch_latents else [],
                cross_attention_kwargs=self._unet_options(conditioning, shape),
            )
        result: torch.Tensor = output[0]
        return result

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> DecodedImages:
        """Decode latents to uint8 pixels in host memory, without waiting for the device."""
        vae = self.pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        decoded = vae.decode(scaled, return_dict=False)[0]
        pixels = to_pixels(decoded)
        return DecodedImages(_to_host(pixels), _to_host(all_finite(decoded)), pixels)

    def find_flagged(self, images: DecodedImages) -> torch.Tensor:
        """Which images the safety checker flags: (images,) bool in host memory, valid once the
        device has finished the copy."""
        assert self.safety_checker is not None, "only a service with a checker has images checked"
        return _to_host(self.safety_checker.flagged(images.on_device))

    @torch.no_grad()
    def fit_preview(self) -> None:
        """Fit the linear map from latents to pixels that `preview` uses to this model's VAE.

        Raises:
            ModelError: the VAE's pixels are not finite.
        """
        side, samples = 16, 8
        generator = torch.Generator("cpu").manual_seed(0)
        channels = self.pipeline.unet.config.in_channels
        coarse = torch.randn((samples, channels, side // 4, side // 4), generator=generator)
        latents = torch.nn.functional.interpolate(coarse, scale_factor=4.0)
        vae = self.pipeline.vae
        scaled = (latents / vae.config.scaling_factor).to(self.device, vae.dtype)
        pixels = vae.decode(scaled, return_dict=False)[0].float().cpu()
        if not pixels.isfinite().all():
            raise ModelError(
                f"the model {self.name!r} cannot draw: its VAE makes pixels that are not finite of "
                f"ordinary latents in {str(vae.dtype).removeprefix('torch.')}."
            )
        pooled = torch.nn.functional.interpolate(pixels, size=(side, side), mode="area")
        inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        # (cells, channels + 1) against (cells, 3)
        solution = torch.linalg.lstsq(
            inputs.permute(0, 2, 3, 1).reshape(-1, channels + 1),
            pooled.permute(0, 2, 3, 1).reshape(-1, 3),
        ).solution
        self._preview_map = solution.to(self.device)

    @torch.no_grad()
    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """Approximate the image of latents (channels, height / 8, width / 8) by a linear map.

        Returns (height / 8, width / 8, 3) uint8 in host memory, valid once the device has finished
        the copy. The map takes microseconds; the VAE takes as long as a denoising step.
        """
        assert self._preview_map is not None, "fit_preview() runs before the first preview"
        cells = latents.float().permute(1, 2, 0)
        pixels = cells @ self._preview_map[:-1] + self._preview_map[-1]
        return _to_host((pixels * 127.5 + 127.5).round_().clamp_(0, 255).to(torch.uint8))

    def _encode_texts(
        self, texts: list[str], chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[bool, ...], tuple[int, ...]]:
        pipeline = self.pipeline
        # Tokenise both before either encoder runs, so that the device waits for no tokenizer.
        read = self.prompt_rules.read(texts)
        tokens = tokenise(pipeline.tokenizer, read, chunks)
        tokens_2 = tokenise(pipeline.tokenizer_2, read, chunks)
        ids, ids_2 = _to_device(tokens.ids, self.device), _to_device(tokens_2.ids, self.device)
        output = pipeline.text_encoder(ids, output_hidden_states=True)
        output_2 = pipeline.text_encoder_2(ids_2, output_hidden_states=True)
        states, states_2 = output.hidden_states[-2], output_2.hidden_states[-2]
        if tokens.weights is not None and tokens_2.weights is not None:
            states = weigh(states, _to_device(tokens.weights, self.device))
            states_2 = weigh(states_2, _to_device(tokens_2.weights, self.device))
        hidden = torch.cat([states, states_2], dim=-1)
        # The chunks of a text are neighbours: joined, they are one longer text.
        hidden = hidden.reshape(len(texts), -1, hidden.shape[-1]).to(self.dtype)
        pooled = output_2[0][::chunks].to(self.dtype)  # the first chunk speaks for the text
        truncated = tuple(one or other for one, other in zip(tokens.cut, tokens_2.cut, strict=True))
        return hidden, pooled, truncated, tokens.counts

    def _prepare_text(
        self, text: TextOnce, conditioning: Conditioning, shape: CompiledShape
    ) -> PreparedText:
        """Compute what the steps of a run of this size will read of the text."""
        embeddings, pooled = conditioning.as_steps_read_it()
        time_ids = self._loop.time_ids(shape.height, shape.width, embeddings.dtype)
        added = {"text_embeds": pooled, "time_ids": time_ids.repeat(len(embeddings), 1)}
        return PreparedText(text.prepare(embeddings, added), shape)

    def _unguided_steps(self, conditioning: Conditioning, shape: CompiledShape) -> _UnguidedSteps:
        """Prepare the steps after a run's guidance has ended, so that they begin without a wait.

        Args:
            conditioning: without guidance.
        """
        embeddings, pooled = conditioning.as_steps_read_it()
        time_ids = self._loop.time_ids(shape.height, shape.width, embeddings.dtype)
        return _UnguidedSteps(
            {
                "prompt_embeds": embeddings,
                "add_text_embeds": pooled,
                "add_time_ids": time_ids.repeat(len(embeddings), 1),
            },
            self._unet_options(conditioning, shape),
        )

    def _unet_options(
        self, conditioning: Conditioning, shape: CompiledShape
    ) -> dict[str, Any] | None:
        """What the steps of a run of this size need of its text beside the embeddings."""
        options: dict[str, Any] = {}
        if self.text is not None:
            prepared = conditioning.prepared
            fits = prepared is not None and prepared.shape == shape
            if prepared is None or not fits or not self.text.holds(prepared.buffered):
                prepared = self._prepare_text(self.text, conditioning, shape)
            options[BUFFERED_TEXT] = prepared.buffered
        if takes_zero_text(self.pipeline.unet) and conditioning.zero_negative:
            options[ZERO_TEXT] = True
        return options or None


def _ends_a_step(evaluation: int, evaluations: int, steps: int, order: int) -> bool:
    """Whether a step ends with this evaluation of the UNet, as diffusers' progress bar counts.

    diffusers calls back after each. Usually that is a step. A scheduler of second order (Heun's,
    DPM2's) evaluates twice in every step but the last, and PNDM once more before its first.
    """
    done = evaluation + 1
    before_the_first = max(0, evaluations - steps * order)
    return done == evaluations or (done > before_the_first and done % order == 0)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device. To a GPU it goes through pinned memory: from other memory the copy
    would wait for the work enqueued so far."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory. From a GPU it goes into pinned memory, behind the work enqueued so
    far, and is not waited for."""
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
