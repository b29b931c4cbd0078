"""One value per user of a column that the log gives with every event.

Legend: R = rows (users), E = events of all these rows, row after row and each row's training events first.
"""

import numpy as np
import pyarrow as pa

from ..errors import UserError
from .statistics import Integers


def value_of_each_user(
    column: str, values_E: pa.Array, users_R: pa.ChunkedArray, *, num_events_R: Integers, num_train_R: Integers
) -> pa.Array:
    """[R] the value of each user's training events, null for users without any.

    Raises UserError for a user whose training events differ in it, a null from a value too: whichever of the values was
    kept, targets before its event would read what was not known then. What it is after training changes nothing.
    """
    begin_R = np.cumsum(num_events_R) - num_events_R
    row_E = np.repeat(np.arange(len(num_events_R)), num_events_R)
    follows_E = np.arange(len(row_E)) - begin_R[row_E]
    is_later_training_E = (follows_E > 0) & (follows_E < num_train_R[row_E])
    # As numbers, of which nulls have one and all NaN have one.
    kinds_E = values_E.dictionary_encode(null_encoding="encode").indices.to_numpy()
    changes_E = is_later_training_E & (kinds_E != np.roll(kinds_E, 1))
    if changes_E.any():
        place = int(np.argmax(changes_E))
        before, after = (values_E[k].as_py() for k in (place - 1, place))
        raise UserError(
            f"--user-column {column!r} changes from {before!r} to {after!r} among the training events of user "
            f"{users_R[int(row_E[place])].as_py()!r}, and events before the change must not know of it: keep it per "
            f"event with --column {column}, or give the user one value in the log"
        )
    return values_E.take(pa.array(begin_R, mask=num_train_R == 0))
