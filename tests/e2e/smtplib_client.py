"""Send a message with the smtplib of the interpreter that runs this.

The argument is a JSON object: port, tls ("", "starttls" or "smtps"), authority (a file), version
("1.2", "1.3" or "" for any), mechanism ("" for no AUTH), user, password, sender, recipients and
message (a file).  Prints the recipients that were refused, or the name of the exception, and the
version of TLS, in JSON.
"""

import json
import smtplib
import ssl
import sys


def connect(options):
    """The session, up to and with TLS."""
    host, port, name = "127.0.0.1", options["port"], "client.example.net"
    if not options["tls"]:
        return smtplib.SMTP(host, port, name, timeout=30)
    context = ssl.create_default_context(cafile=options["authority"])
    if options["version"]:
        version = ssl.TLSVersion["TLSv" + options["version"].replace(".", "_")]
        context.minimum_version = context.maximum_version = version
    if options["tls"] == "smtps":
        return smtplib.SMTP_SSL(host, port, name, timeout=30, context=context)
    session = smtplib.SMTP(host, port, name, timeout=30)
    session.starttls(context=context)
    return session


def send(options):
    """What became of it."""
    with connect(options) as session:
        version = session.sock.version() if options["tls"] else None
        session.ehlo_or_helo_if_needed()
        if options["mechanism"]:
            session.user, session.password = options["user"], options["password"]
            method = "auth_" + options["mechanism"].lower().replace("-", "_")
            session.auth(options["mechanism"], getattr(session, method))
        with open(options["message"], "rb") as message:
            refused = session.sendmail(options["sender"], options["recipients"], message.read())
        return {"refused": list(refused), "version": version}


if __name__ == "__main__":
    try:
        print(json.dumps(send(json.loads(sys.argv[1]))))
    except smtplib.SMTPException as error:
        print(json.dumps({"error": type(error).__name__, "code": getattr(error, "smtp_code", 0)}))
