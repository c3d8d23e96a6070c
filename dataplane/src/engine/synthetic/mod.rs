//! Synthetic answers: an address of its own for every name that a guest looks up.
//!
//! With `dns.answer: synthetic` the guest gets an address from a reserved range at once, and nothing is sent
//! upstream ([`table`]). What it then opens to that address is judged by the name alone. Only when that is
//! allowed is the name really looked up; the address found is judged in its turn, by what denies and by the
//! guards, and then dialled (`resolve.rs`). So one question is asked for a name and port, addresses that many
//! names share do not matter, and not a byte of DNS leaves before the yes.

mod resolve;
pub mod table;
