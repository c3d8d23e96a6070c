//! local
pub mod bindings;
pub mod gateway;
/// Time since the engine started, on a clock that counts suspended time.
pub type Time = std::time::Duration;
