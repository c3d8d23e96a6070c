//! What the guest sees as its router beyond ARP and echo: addresses by DHCP, names by DNS.

pub mod dhcp;
pub mod dns;
pub mod ndp;
