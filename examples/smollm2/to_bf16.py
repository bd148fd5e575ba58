"""Keep an adapter's matrices in bfloat16, which halves them: the base is in bfloat16 too. Angles and scales stay.

python examples/smollm2/to_bf16.py ADAPTER [ADAPTER...]
"""

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

MATRICES = (".qaa_weight", ".lora_A.weight", ".lora_B.weight")

for directory in sys.argv[1:]:
    path = Path(directory) / "adapter_model.safetensors"
    tensors = {
        name: tensor.bfloat16() if name.endswith(MATRICES) else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    print(f"{path}: {path.stat().st_size:,} bytes")
