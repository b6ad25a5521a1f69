#!/bin/sh
# Deploy hook for acme.sh: link it into its directory deploy, and tell it of a certificate once by
#
#     acme.sh --deploy -d mx.example.org --deploy-hook qmail_smtpd
#
# acme.sh reads it, and calls the function for each renewal: the name, and the files with the key,
# the certificate, its issuers' and all certificates.  put-certificate tells where they go.

qmail_smtpd_deploy() {
    "/usr/local/qmail-smtpd-py/hooks/put-certificate" "$2" "$5"
}
