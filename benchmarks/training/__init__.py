"""Training experiments: several runs with their baselines, in slices of time, to one report.

``options`` (the file), ``layout`` (what lies where), ``models`` and ``students`` (what starts from
what), ``task``, ``stage_tasks`` and ``plan`` (what there is to do), ``stages`` (what a run came
to), ``measure`` (one model), ``packing`` (edits in small files), ``runner`` (budget, locks,
failures), ``rows``, ``markdown``, ``figure`` and ``report``, ``command``.
"""
