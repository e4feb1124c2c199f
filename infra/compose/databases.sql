-- Run once, when Postgres makes its folder: the app's database is POSTGRES_DB, MLflow's is this.
CREATE DATABASE mlflow;
