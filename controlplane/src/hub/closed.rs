//! Where dataplanes, and the programs that started them, listen over TCP: closed to the guests of every dataplane.
//!
//! A dataplane closes its own listeners by itself. Those of another it knows only from here, and whoever reaches them
//! answers for that one's guests, or becomes one.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use tonic::Status;
use vnet_proto::v1;
use vnet_proto::v1::session_response::Message;

use super::State;
use crate::fleet::{CLOSED_MAX, DataplaneNo};

/// What a Hello says is closed. Refused when it cannot all be kept: what is left out would be open.
pub(super) fn closed_of(hello: &v1::Hello) -> Result<BTreeSet<SocketAddr>, Status> {
    let addresses = &hello.closed_addresses;
    if addresses.len() > CLOSED_MAX {
        let count = addresses.len();
        return Err(Status::invalid_argument(format!(
            "hello.closed_addresses has {count} entries (at most {CLOSED_MAX})"
        )));
    }
    let read = |text: &String| {
        let at = text.parse::<SocketAddr>().map_err(|_| {
            Status::invalid_argument(format!(
                "hello.closed_addresses is {text:?}, which does not parse (expected ip:port)"
            ))
        })?;
        Ok(SocketAddr::new(at.ip().to_canonical(), at.port()))
    };
    addresses.iter().map(read).collect()
}

impl State {
    /// What every other dataplane has closed, lost ones included: they may listen on.
    pub(super) fn closed_by_others(&self, number: DataplaneNo) -> Vec<String> {
        let others = self.fleet.dataplanes.iter().filter(|(n, _)| **n != number);
        let closed: BTreeSet<_> = others.flat_map(|(_, dataplane)| &dataplane.closed).collect();
        closed.into_iter().map(ToString::to_string).collect()
    }

    /// Tells the other dataplanes that this one has closed something else than before.
    pub(super) fn tell_closed(&mut self, number: DataplaneNo) {
        let others: Vec<_> = self
            .fleet
            .dataplanes
            .iter()
            .filter(|(n, dataplane)| **n != number && dataplane.hears_closed && dataplane.link.is_some())
            .map(|(n, _)| *n)
            .collect();
        for other in others {
            let addresses = self.closed_by_others(other);
            self.send(other, Message::ClosedAddresses(v1::ClosedAddresses { addresses }));
        }
    }
}
