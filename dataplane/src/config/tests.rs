//! Configuration tests.
