//! The gateway's port 80, where a network offers it: what a guest asks of its network, as podman machine asks for
//! ports from inside.
//!
//! The engine only accepts the connection; what is said on it is the front's. No verdict is asked for, as it goes
//! nowhere but to the gateway itself, and the session is not told. It counts as a flow, and as one of the few that
//! a guest may have here at once.

use vnet_proto::model::FlowKey;

use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;
use crate::engine::judge::Wanted;
use crate::engine::reply;
use crate::engine::tcp::DIAL_PATIENCE;
use crate::engine::{Engine, Event, Time};

/// The port, on the gateway's IPv4 address.
pub const GUEST_API_PORT: u16 = 80;
/// Connections of one guest to it at once.
pub const GUEST_API_FLOWS_MAX: usize = 16;

/// How one guest uses it.
#[derive(Debug, Default)]
pub(super) struct GuestApi {
    /// It is offered.
    pub(super) offered: bool,
    /// Connections that are there.
    pub(super) live: usize,
    /// Those refused at the limit.
    pub(super) refused: u64,
}

impl Engine {
    /// Offers it to this guest from now on: the driver answers [`Event::OpenGuestApi`].
    pub fn offer_guest_api(&mut self) {
        self.guest_api.offered = true;
    }

    /// A guest's SYN to it: the guest is answered once the driver has a way to the front.
    ///
    /// # Errors
    /// At a limit; the guest is to be refused.
    pub(super) fn open_guest_api(&mut self, now: Time, ip: &Ip<'_>, key: FlowKey) -> Result<(), DropReason> {
        if self.guest_api.live >= GUEST_API_FLOWS_MAX {
            self.guest_api.refused += 1;
            return Err(DropReason::FlowLimit);
        }
        let descriptor = self.take_descriptor().ok_or(DropReason::FlowLimit)?;
        let state = State::Dialing {
            syn: reply::kept_syn(ip),
            deadline: now + DIAL_PATIENCE,
        };
        let at = self.new_flow(now, Wanted::plain(key), state);
        self.guest_api.live += 1;
        if let Some(flow) = self.flows.get_mut(at) {
            flow.descriptor = Some(descriptor);
            flow.is_guest_api = true;
        }
        self.events.push_back(Event::OpenGuestApi {
            flow: at,
            guest: key.guest.ip(),
        });
        self.schedule(now, at);
        Ok(())
    }
}
