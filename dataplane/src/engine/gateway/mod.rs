//! What the guest sees as its router.
pub mod dhcp;
pub mod dns;
