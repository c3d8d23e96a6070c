//! Host sockets: where allowed flows go on as ordinary sockets of the host.

pub mod resolver;
pub mod sockets;
pub mod stream;
pub mod way;
