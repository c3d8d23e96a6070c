//! IPv6 on the guest's link: who has which address, and what the gateway says of itself (RFC 4861, RFC 4862).
//!
//! The gateway answers for its own addresses. A guest's address is its own once duplicate address detection,
//! an announcement or a packet of it shows it and nobody else has it, like an IPv4 address that ARP shows;
//! whoever probes for one that is not free is told so. What only a router may say never passes.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use ipnet::Ipv6Net;
use vnet_proto::model::Name;

use crate::engine::frame::{DropReason, Frame};
use crate::engine::gateway::ndp::{self, Message};
use crate::engine::ip::Ip;
use crate::engine::reply::{self, ICMPV6};
use crate::engine::timer::Timer;
use crate::engine::{Engine, Outcome, Time};
use crate::mac::Mac;

/// How often the gateway advertises itself unasked (RFC 4861 §6.2.1 has 200 to 600 s as the default).
pub const ADVERTISE_INTERVAL: Duration = Duration::from_secs(300);

/// Multicast listener discovery (RFC 2710, RFC 3810).
const LISTENERS: [u8; 4] = [130, 131, 132, 143];

/// IPv6 on a guest's link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipv6Config {
    /// The prefix that guests make their addresses of: 64 bits.
    pub prefix: Ipv6Net,
    /// The gateway's address in it, which is also the resolver's.
    pub gateway: Ipv6Addr,
    /// The gateway's address on the link.
    pub link_local: Ipv6Addr,
    /// Search domains to advertise, unless the host's are followed.
    pub search: Vec<Name>,
}

impl Ipv6Config {
    /// A network with this prefix: the gateway is its address 1, and `fe80::1` on the link.
    pub fn new(prefix: Ipv6Net, search: Vec<Name>) -> Self {
        Self {
            prefix,
            gateway: Ipv6Addr::from_bits(prefix.network().to_bits() | 1),
            link_local: ndp::LINK_LOCAL,
            search,
        }
    }
}

impl Engine {
    pub(super) fn handle_ipv6<'a>(
        &mut self,
        now: Time,
        frame: &Frame<'a>,
        ip: &Ip<'a>,
    ) -> Result<Outcome<'a>, DropReason> {
        if self.config.ipv6.is_none() {
            return Err(DropReason::Ipv6);
        }
        let (IpAddr::V6(source), IpAddr::V6(_)) = (ip.source, ip.destination) else {
            return Err(DropReason::Malformed);
        };
        if ndp::is_discovery(ip) {
            return self.handle_discovery(now, frame, ip, source);
        }
        // Who listens to which group matters to nobody: all of the link hears what is sent to one.
        let kind = ip.payload().first();
        if ip.protocol == ICMPV6 && !ip.is_fragment() && kind.is_some_and(|k| LISTENERS.contains(k)) {
            return Ok(Outcome::Done);
        }
        self.check_source_ipv6(now, frame.source, source)?;
        if frame.destination != self.config.gateway_mac {
            return self.switch(now, frame);
        }
        if let Some(mac) = self.routed(ip) {
            return Ok(Outcome::Switch(mac));
        }
        self.handle_ip(now, ip)
    }

    fn handle_discovery<'a>(
        &mut self,
        now: Time,
        frame: &Frame<'a>,
        ip: &Ip<'a>,
        source: Ipv6Addr,
    ) -> Result<Outcome<'a>, DropReason> {
        let message = ndp::parse(ip)?;
        let (Message::RouterSolicitation { mac }
        | Message::NeighbourSolicitation { mac, .. }
        | Message::NeighbourAdvertisement { mac, .. }) = message
        else {
            return Err(DropReason::RogueNdp);
        };
        if mac.is_some_and(|mac| mac != frame.source) {
            return Err(DropReason::SpoofedMac);
        }
        if !source.is_unspecified() {
            self.check_source_ipv6(now, frame.source, source)?;
        }
        match message {
            Message::RouterSolicitation { .. } => self.advertise(Some(source)),
            Message::NeighbourSolicitation { target, .. } if source.is_unspecified() => {
                self.handle_probe(now, frame.source, target)
            }
            Message::NeighbourSolicitation { target, .. }
                if self.is_gateway(target.into()) || self.closed_neighbour(target.into()).is_some() =>
            {
                self.tell_neighbour(target, source, true)
            }
            Message::NeighbourAdvertisement { target, .. } => {
                // What it announces must be its own, or free.
                self.check_source_ipv6(now, frame.source, target)
                    .map_err(|_| DropReason::RogueNdp)?;
                if frame.destination == self.config.gateway_mac || !self.settings.switch_open {
                    return Ok(Outcome::Done);
                }
                return self.switch(now, frame);
            }
            _ => return self.switch(now, frame),
        }?;
        Ok(Outcome::Done)
    }

    /// Duplicate address detection (RFC 4862 §5.4): a free address becomes the guest's, and of one that it
    /// cannot have it is told that somebody has it.
    fn handle_probe(&mut self, now: Time, mac: Mac, target: Ipv6Addr) -> Result<(), DropReason> {
        match self.check_source_ipv6(now, mac, target) {
            Ok(()) => Ok(()),
            // Nobody's on this link: there is no one whose it could be said to be.
            Err(reason) if !self.is_guest_address(target.into()) && !self.is_gateway(target.into()) => {
                Err(reason)
            }
            Err(reason) => {
                self.tell_neighbour(target, ndp::ALL_NODES, false)?;
                match reason {
                    DropReason::AddressLimit => Err(reason),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Says who has an address: the gateway, or another guest, whose own MAC address is told (see
    /// [`super::switch`]).
    fn tell_neighbour(&mut self, target: Ipv6Addr, to: Ipv6Addr, is_answer: bool) -> Result<(), DropReason> {
        let is_router = self.is_gateway(target.into());
        let mac = match self.surroundings.neighbour(target.into()) {
            Some(neighbour) if !is_router => neighbour.mac,
            _ => self.config.gateway_mac,
        };
        let message = ndp::advertisement(target, mac, is_router, is_answer);
        if reply::discovery(&mut self.transmit, mac, target, to, &message) {
            Ok(())
        } else {
            Err(DropReason::TransmitQueueFull)
        }
    }

    /// Advertises the gateway, to who asked or to the link.
    fn advertise(&mut self, to: Option<Ipv6Addr>) -> Result<(), DropReason> {
        let Some(ipv6) = &self.config.ipv6 else {
            return Ok(());
        };
        let followed = self.surroundings.followed_search();
        let router = ndp::Router {
            mac: self.config.gateway_mac,
            prefix: ipv6.prefix,
            resolver: ipv6.gateway,
            search: followed.as_deref().unwrap_or(&ipv6.search),
            mtu_bytes: self.config.mtu_bytes,
            is_default: self.surroundings.has_ipv6(),
        };
        let to = to.filter(|to| !to.is_unspecified()).unwrap_or(ndp::ALL_NODES);
        let mac = self.config.gateway_mac;
        if reply::discovery(
            &mut self.transmit,
            mac,
            ipv6.link_local,
            to,
            &router.advertisement(),
        ) {
            Ok(())
        } else {
            Err(DropReason::TransmitQueueFull)
        }
    }

    /// The guest has shown itself: advertises the gateway now, and from now on.
    pub(super) fn begin_advertising(&mut self, now: Time) {
        if self.config.ipv6.is_some() && !std::mem::replace(&mut self.advertising, true) {
            self.handle_advertise_timeout(now);
        }
    }

    pub(super) fn handle_advertise_timeout(&mut self, now: Time) {
        self.timers.set(now + ADVERTISE_INTERVAL, Timer::Advertise);
        self.handle_way_changed();
    }

    /// The host's way out came or went: guests hear of it at once. What finds no room in the queue is heard
    /// with the next advertisement.
    pub(super) fn handle_way_changed(&mut self) {
        if self.advertising && self.advertise(None).is_err() {
            self.count_drop(DropReason::TransmitQueueFull);
        }
    }
}
