"""MLflow: a training's run with its settings, data and figures (``runs``), captioners in MLflow's model format
(``model_format``), and finding them again by name (``registry``).
All that is written to MLflow is written by ``runs.Tracker``.

Knows nothing of how a captioner is trained or used. Models logged long ago are loaded by the name ``capray.model.pyfunc``,
which stays.
"""
