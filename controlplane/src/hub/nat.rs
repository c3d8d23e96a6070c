//! Destinations of a dataplane's guests that are dialled at other addresses, as its Hello says them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use tonic::Status;
use vnet_proto::v1;

use super::attach::optional;
use crate::fleet::NAT_MAX;
use crate::policy::GuardedRanges;

/// What a Hello says is dialled at other addresses: the host alias at loopback, and the rest.
pub(super) fn nat_of(hello: &v1::Hello) -> Result<HashMap<IpAddr, IpAddr>, Status> {
    if hello.nat.len() > NAT_MAX {
        let count = hello.nat.len();
        return Err(Status::invalid_argument(format!(
            "hello.nat has {count} entries (at most {NAT_MAX})"
        )));
    }
    let address = |field, text: &String| {
        optional(field, text, |t| t.parse::<IpAddr>().ok())?
            .ok_or_else(|| Status::invalid_argument(format!("hello.{field} is empty (expected an address)")))
    };
    let mut nat = HashMap::new();
    for entry in &hello.nat {
        let from = address("nat.address", &entry.address)?;
        let dialled = address("nat.dialled", &entry.dialled)?;
        nat.insert(from, dialled);
    }
    if let Some(alias) = optional("host_alias", &hello.host_alias, |t| t.parse::<IpAddr>().ok())? {
        nat.insert(alias, Ipv4Addr::LOCALHOST.into());
    }
    Ok(nat)
}

/// What a dataplane guards. What is dialled at an address of the host is guarded as one.
pub(super) fn guarded(
    subnets: &[ipnet::IpNet],
    nat: &HashMap<IpAddr, IpAddr>,
    host_addresses: Vec<IpAddr>,
) -> GuardedRanges {
    GuardedRanges::new(subnets.iter().copied(), host_addresses).with_moved(nat.keys().copied())
}
