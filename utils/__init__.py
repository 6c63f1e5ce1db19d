"""The recipe's parts. Importing any of them first settles what its libraries read from the environment, and quiets what
they print while they load."""

import logging
import os
import warnings

from utils import start

start.settle()

# Optional image processors without torchvision, native extensions for kernels that are not used here: none of it is
# news to a user of this recipe. Errors still show, and each variable can be set from outside.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
logging.getLogger("torchao").setLevel(logging.ERROR)
for message in (".*does not implement _stable_hash_for_caching", "Dynamo detected a call to a `functools.lru_cache`",
                ".*Failed to pickle cache key"):
    warnings.filterwarnings("ignore", message=message)
