# Runs once in the new conda environment, from the repository root.
pip install torch==2.13.0
pip install --no-deps --require-hashes -r requirements.lock
pip install --no-deps --no-build-isolation --editable .
