//! The engine under virtual time: a scripted guest on one side, scripted sockets and session on the
//! other.

mod aliases;
mod away;
mod budget;
mod cost;
mod counters;
mod datagram;
mod ends;
mod guest_api;
mod identity;
mod ingress;
mod ipv6;
mod kit;
mod learned;
mod limits;
mod naming;
mod nat;
mod neighbours;
mod opening;
mod resolvers;
mod segments;
mod synthetic;
mod tcp;
mod town;
mod verdict;
