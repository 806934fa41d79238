"""A base and its fine-tuned models, checked against each other, as a stream of differences."""

from fusionkit.task_vectors.topk import Thresholds as Thresholds
from fusionkit.task_vectors.topk import top_k as top_k
from fusionkit.task_vectors.topk import top_k_of as top_k_of
from fusionkit.task_vectors.vectors import Change as Change
from fusionkit.task_vectors.vectors import ChangedVectors as ChangedVectors
