"""The tasks of a config, read and checked: all faults of all of them at once."""

from collections.abc import Sequence

from gist_train.config.errors import Fault, UserError
from gist_train.config.evaluation import (
    ClassificationTask,
    ClusteringTask,
    EvaluationTask,
    MtebTask,
    PairTask,
    RetrievalTask,
    StsTask,
    TripletTask,
)
from gist_train.results.loaded_tasks import LoadedTask
from gist_train.results.mteb_tasks import read_mteb
from gist_train.results.retrieval_files import read_retrieval
from gist_train.results.task_readers import read_classification, read_clustering, read_pairs, read_sts, read_triplets


def load_tasks(tasks: Sequence[EvaluationTask]) -> list[LoadedTask]:
    """The tasks with their files read and checked, in order.

    Raises:
        UserError: with all faults of all tasks.
    """
    faults: list[Fault] = []
    loaded: list[LoadedTask | None] = []
    for index, task in enumerate(tasks):
        where = f"evaluation.tasks[{index}] ({task.name})"
        match task:
            case StsTask():
                loaded.append(read_sts(task, where, faults))
            case RetrievalTask():
                loaded.append(read_retrieval(task, where, faults))
            case ClassificationTask():
                loaded.append(read_classification(task, where, faults))
            case ClusteringTask():
                loaded.append(read_clustering(task, where, faults))
            case PairTask():
                loaded.append(read_pairs(task, where, faults))
            case TripletTask():
                loaded.append(read_triplets(task, where, faults))
            case MtebTask():
                loaded.append(read_mteb(task, where, faults))
    if faults:
        raise UserError(*faults)
    return [task for task in loaded if task is not None]  # none is None where there is no fault
