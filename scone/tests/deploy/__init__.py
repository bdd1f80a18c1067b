"""That what deploys us is well-formed: scripts, cloud-init, service, job, container."""
