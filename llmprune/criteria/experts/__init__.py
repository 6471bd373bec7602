"""Expert criteria, one a file; a file that is added here is found without being named anywhere."""

from llmprune.common.variants import import_kinds

import_kinds(__name__)
