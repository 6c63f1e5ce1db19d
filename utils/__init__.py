"""The modules of the recipe.

Importing any of them first sets the environment variables that the libraries read, and silences the libraries' output
while they load.
"""

import logging
import os
import warnings

from utils import start

start.settle()

# The libraries warn about image processors that need torchvision, and about native extensions of unused kernels. These
# warnings do not concern a user of this recipe. Errors still appear, and the user may set each variable.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
logging.getLogger("torchao").setLevel(logging.ERROR)
for message in (".*does not implement _stable_hash_for_caching", "Dynamo detected a call to a `functools.lru_cache`",
                ".*Failed to pickle cache key"):
    warnings.filterwarnings("ignore", message=message)
