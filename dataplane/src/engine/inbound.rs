//! What a guest sends to the network itself: ARP, DHCP, and IP towards the gateway.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::engine::frame::{Arp, DropReason, Frame};
use crate::engine::ip::Ip;
use crate::engine::reply::{self, ICMP, ICMPV6, TCP, UDP};
use crate::engine::{Engine, Outcome, Time};
use crate::mac::Mac;

const DHCP_SERVER_PORT: u16 = 67;
const DHCP_CLIENT_PORT: u16 = 68;
/// DHCPv6 servers answer from here (RFC 8415 §7.2).
const DHCPV6_SERVER_PORT: u16 = 547;

impl Engine {
    pub(super) fn handle_arp<'a>(
        &mut self,
        now: Time,
        frame: &Frame<'a>,
        arp: &Arp,
    ) -> Result<Outcome<'a>, DropReason> {
        if arp.sender_mac != frame.source {
            return Err(DropReason::SpoofedMac);
        }
        // A probe (RFC 5227 §2.1.1) has no sender yet and claims nothing.
        if arp.sender != Ipv4Addr::UNSPECIFIED {
            self.check_source(now, frame.source, arp.sender)?;
        }
        match self.tell_mac(arp) {
            Some(true) => return Ok(Outcome::Done),
            Some(false) => return Err(DropReason::TransmitQueueFull),
            None => {}
        }
        if frame.destination == self.config.gateway_mac || arp.target == arp.sender {
            // A reply to us, or an announcement, which the claim above has taken note of.
            return Ok(Outcome::Done);
        }
        self.switch(now, frame)
    }

    /// DHCP goes to the gateway's server whatever its addresses, and nowhere else.
    pub(super) fn is_dhcp(&self, ip: &Ip<'_>) -> bool {
        ip.protocol == UDP
            && !ip.is_fragment()
            && ip.payload().get(2..4) == Some(&DHCP_SERVER_PORT.to_be_bytes())
            && matches!(ip.destination, IpAddr::V4(to) if to == Ipv4Addr::BROADCAST
                || to == self.config.gateway
                || to == self.config.subnet.broadcast())
    }

    pub(super) fn handle_dhcp(&mut self, now: Time, source: Mac, ip: &Ip<'_>) {
        let Some(message) = ip.payload().get(8..) else {
            self.count_drop(DropReason::Malformed);
            return;
        };
        let outcome = self.surroundings.dhcp(self.config.vm, source, message, now);
        if let Some(why) = outcome.ignored {
            self.dhcp.add(why);
        }
        if let Some(address) = outcome.bound {
            self.bind_address(address);
            if self.leased.replace(address) != Some(address) {
                self.note_status();
            }
        }
        if let Some(address) = outcome.released {
            if self.leased == Some(address) {
                self.leased = None;
            }
            self.addresses.retain(|a| *a != address);
            self.end_switched_of(now, address.into());
            self.note_status();
        }
        if let Some(name) = outcome.claimed_hostname
            && name != self.claimed_hostname
        {
            self.claimed_hostname = name;
            self.note_status();
        }
        self.want_report(now);
        let Some(answer) = outcome.reply else { return };
        let from = SocketAddr::new(self.config.gateway.into(), DHCP_SERVER_PORT);
        let to = SocketAddr::new(answer.to.into(), DHCP_CLIENT_PORT);
        let guest = std::mem::replace(&mut self.transmit.guest, answer.to_mac);
        if !reply::udp(
            &mut self.transmit,
            from,
            to,
            &answer.payload,
            self.config.mtu_bytes,
        ) {
            self.count_drop(DropReason::TransmitQueueFull);
        }
        self.transmit.guest = guest;
    }

    pub(super) fn handle_ip<'a>(&mut self, now: Time, ip: &Ip<'a>) -> Result<Outcome<'a>, DropReason> {
        if ip.is_fragment() {
            return self.handle_fragment(now, ip);
        }
        match (ip.protocol, ip.destination) {
            (TCP, _) => match ip.without_extensions() {
                None => self.handle_tcp(now, ip),
                // What a connection keeps of it, and smoltcp, know no extensions.
                Some(packet) => Ok(self.handle_tcp(now, &Ip::parse(&packet)?)?.into_owned()),
            },
            (UDP, _) => self.handle_udp(now, ip),
            (ICMP, IpAddr::V4(_)) | (ICMPV6, IpAddr::V6(_)) => self.handle_icmp(now, ip),
            _ => Err(DropReason::IpProtocol),
        }
    }

    /// Fragments become one packet before anything looks at ports. TCP is never fragmented by an
    /// honest guest: the MSS sees to that.
    fn handle_fragment<'a>(&mut self, now: Time, part: &Ip<'_>) -> Result<Outcome<'a>, DropReason> {
        let carried = match part.source {
            IpAddr::V4(_) => matches!(part.protocol, UDP | ICMP),
            // Further headers may stand in between.
            IpAddr::V6(_) => part.protocol != TCP,
        };
        if !carried {
            return Err(DropReason::Fragment);
        }
        let Some(packet) = self.fragments.handle(now, part)? else {
            return Ok(Outcome::Done);
        };
        let whole = Ip::parse(&packet)?;
        let outcome = match (whole.protocol, whole.destination) {
            _ if whole.is_fragment() => return Err(DropReason::Fragment),
            (UDP, _) => self.handle_udp(now, &whole)?,
            (ICMP, IpAddr::V4(_)) | (ICMPV6, IpAddr::V6(_)) => self.handle_icmp(now, &whole)?,
            (TCP, _) => return Err(DropReason::Fragment),
            _ => return Err(DropReason::IpProtocol),
        };
        Ok(outcome.into_owned())
    }
}

impl Outcome<'_> {
    /// The same, with bytes of its own.
    fn into_owned<'b>(self) -> Outcome<'b> {
        let (flow, payload) = match self {
            Outcome::Datagram { flow, payload } => (flow, payload),
            Outcome::Echo { flow, message } => (flow, message),
            Outcome::Pass { flow, packet } => (flow, packet),
            Outcome::Assembled { flow, payload } => return Outcome::Assembled { flow, payload },
            Outcome::Datagrams { flow, payloads } => return Outcome::Datagrams { flow, payloads },
            Outcome::Done | Outcome::Switch(_) => return Outcome::Done,
        };
        Outcome::Assembled {
            flow,
            payload: payload.to_vec(),
        }
    }
}

/// Whether a packet comes from a DHCP server's port, of either family's. Later fragments do not say.
pub(super) fn is_dhcp_answer(ip: &Ip<'_>) -> bool {
    let server = match ip.source {
        IpAddr::V4(_) => DHCP_SERVER_PORT,
        IpAddr::V6(_) => DHCPV6_SERVER_PORT,
    };
    ip.protocol == UDP
        && ip.part.is_none_or(|part| part.offset == 0)
        && ip.payload().get(..2) == Some(&server.to_be_bytes())
}
