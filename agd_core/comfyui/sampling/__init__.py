"""A MODEL that samples with guidance embedded.

Adapters: `apply` puts them on a MODEL; `outer_sample` runs each of its samplings, and runs it again where needed
(`restarts`), as a `guided_sampling`, whose steps get what `step_builder` makes of `applied_adapter`s and the negatives
(`negatives`, `negative_cache`). Guidance without training: `training_free` runs a `forecast_sampling`. Both warn
the user with the sentences in `messages`.
"""
