"""Give a training process its batches from prepared sources; may know (replica, replicas), no mesh and no reader."""
