//! The controlplane: decides, remembers and asks people; never touches a packet.

pub mod approval;
pub mod grant;
pub mod policy;
